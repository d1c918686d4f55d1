"""The demo's corpus: text curated, a tokenizer trained on it, rows packed by source and quality."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.pipeline import FORMAT, curate
from bc2_jax.data.demo_corpus import demo_documents
from bc2_jax.data.pinned_package import default_cache, publishing
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.files import fingerprint
from bc2_jax.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

# A vocabulary of a few thousand can't hold all 3,800 characters of the novel: the rare half become bytes.
_CHARACTER_COVERAGE = 0.995


@dataclasses.dataclass(frozen=True)
class DemoCorpus:
    """Files made by `prepare_demo`."""

    tokenizer: Path
    sources: dict[str, Path]
    """Folder of packed rows by language."""
    report: Path
    """The report of the curation."""


def prepare_demo(
    cache: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int = 4096,
    sequence_length: int = 256,
    validation_fraction: float = 0.08,
) -> DemoCorpus:
    """Curates the demo text, trains a tokenizer on it and packs it, in seconds; an existing result is returned at once.

    The folder in `cache` is named by a hash of the settings, the text and the version of Python, and appears when it is
    complete.
    """
    cache = Path(cache) if cache is not None else default_cache()
    documents = demo_documents(cache)
    config = CurationConfig()
    settings = [vocab_size, sequence_length, validation_fraction, _CHARACTER_COVERAGE, sys.version_info[:3], documents]
    settings += [FORMAT, dataclasses.asdict(config)]
    key = fingerprint(settings, sort_keys=False)[:16]
    folder = cache / f"demo-{key}"
    sources = {language: folder / "rows" / language for language in documents}
    corpus = DemoCorpus(folder / "tokenizer.model", sources, folder / "curated" / "report.md")
    if folder.is_dir():
        logger.info("demo corpus: found in %s", folder)
        return corpus

    begin = time.perf_counter()
    with publishing(folder) as temporary:
        raw, curated = temporary / "raw", temporary / "curated"
        raw.mkdir(parents=True)
        for source, texts in documents.items():
            records = ({"id": f"{source}-{i}", "text": text, "source": source} for i, text in enumerate(texts))
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in records]
            (raw / f"{source}.jsonl").write_text("".join(lines), encoding="utf-8")
        report = curate([str(raw)], str(curated), config, Engine("native"), lambda *_: None)
        shutil.rmtree(curated / "work")
        read, written = report["read"], report["written"]
        logger.info(
            "demo corpus: curation kept %d of %d documents, %.2f of %.2f MB",
            written["documents"], read["documents"], written["bytes"] / 1e6, read["bytes"] / 1e6,
        )  # fmt: skip
        files = sorted((curated / "documents").glob("*.parquet"))
        kept = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
        train_tokenizer(kept, temporary / "tokenizer.model", vocab_size, character_coverage=_CHARACTER_COVERAGE)
        packing = Settings(sequence_length=sequence_length, validation_fraction=validation_fraction)
        rows = tokenize_corpus([curated], temporary / "tokenizer.model", temporary / "rows", packing)
        for part in rows.parts:
            logger.info(
                "demo corpus: %s has %d documents and %d tokens for training", part.path, part.documents, part.tokens
            )
    logger.info("demo corpus: written to %s in %.1f s", folder, time.perf_counter() - begin)
    return corpus
