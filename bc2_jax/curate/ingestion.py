"""One unit of raw files -> tables of normal documents: read, normalise, identify the language, hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bc2_jax.curate.inputs import ReadConfig, Unit
from bc2_jax.curate.languages import identify_languages
from bc2_jax.curate.normalization import large_strings, normalize_texts
from bc2_jax.curate.problems import UnitReport
from bc2_jax.curate.reading import Rows, read_unit

if TYPE_CHECKING:
    import pyarrow as pa


def read_shards(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[pa.Table]:
    """Tables of about config.shard_bytes of text each, in the order of the raw files.

    Columns: doc int64 (unit << 32 | running number), id string, text large_string (normal form, not empty), source
    string, language string, h1 and h2 int64 (128 bits of BLAKE2b of the text's UTF-8). report is complete when the last
    table was taken.
    """
    import pyarrow as pa

    batches: list[pa.RecordBatch] = []
    size = 0
    for rows in read_unit(unit, config, report):
        batch = _normal_batch(rows, report)
        if batch is not None:
            batches.append(batch)
            size += batch.nbytes
        if size >= config.shard_bytes:
            yield pa.Table.from_batches(batches).combine_chunks()
            batches, size = [], 0
    if batches:
        yield pa.Table.from_batches(batches).combine_chunks()


def _normal_batch(rows: Rows, report: UnitReport) -> pa.RecordBatch | None:
    import pyarrow as pa

    texts, changed = normalize_texts(rows.texts)
    report.normalized.update(changed)
    kept = [i for i, text in enumerate(texts) if text]
    if len(kept) < len(texts):
        for i, text in enumerate(texts):
            if not text:
                file, line, byte = rows.places[i]
                report.add(file, "the text is empty", line=line, byte=byte, content=rows.ids[i])
        texts = [texts[i] for i in kept]
    if not texts:
        return None
    ids, sources, hints = ([column[i] for i in kept] for column in (rows.ids, rows.sources, rows.languages))
    languages = identify_languages(texts, hints, sources)
    report.languages.update(languages)
    encoded = [text.encode() for text in texts]
    hashes = hash_texts(encoded)
    first = (report.unit << 32) + report.documents
    report.documents += len(texts)
    report.normal_bytes += sum(map(len, encoded))
    columns = {
        "doc": pa.array(np.arange(first, first + len(texts))),
        "id": pa.array(ids, pa.string()),
        "text": large_strings(texts, encoded),
        "source": pa.array(sources, pa.string()),
        "language": pa.array(languages, pa.string()),
        "h1": pa.array(hashes[:, 0]),
        "h2": pa.array(hashes[:, 1]),
    }
    return pa.RecordBatch.from_pydict(columns)


def hash_texts(encoded: Sequence[bytes]) -> np.ndarray:
    """int64 [D, 2]: BLAKE2b of 16 bytes, little-endian; equal on every machine, 1 GB/s, and no text can be made to
    collide with another."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in encoded)
    return np.frombuffer(digests, "<i8").reshape(-1, 2)
