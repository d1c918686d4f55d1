"""What documents are compared by, counted on their tokens: MinHash signatures and a sketch of their n-grams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import minhash
from bc2_jax.curate.embedding import DocumentFrequencies, HashedNgrams
from bc2_jax.curate.engine import Task
from bc2_jax.curate.headers import header_tokens
from bc2_jax.curate.shards import binary_rows
from bc2_jax.curate.tokens import Tokens, token_pieces, without_first

if TYPE_CHECKING:
    from bc2_jax.curate.tasks import Run

# Document frequencies are counted in so many documents of a shard, evenly spaced: those that matter settle fast.
_COUNTED_DOCUMENTS = 256


def count_words(run: Run, task: Task) -> Task:
    """Document frequencies of hashed tokens, in some documents of those shards from which they are estimated."""
    table = (run.work / "read" / "shards").read_table(f"{task['shard']}.parquet", ["text"])
    sample = np.unique(np.linspace(0, table.num_rows - 1, min(_COUNTED_DOCUMENTS, table.num_rows), dtype=np.int64))
    frequencies = DocumentFrequencies.of(table["text"].take(pa.array(sample)).to_pylist())
    (run.work / "filter" / "frequencies").write(f"{task['shard']}.i8", frequencies.counts.astype("<i8").tobytes())
    return {"documents": frequencies.documents}


def write_features(run: Run, name: str, table: pa.Table, tokens: Tokens, sketch: HashedNgrams | None) -> None:
    """Writes the signatures, the sketches if there are any, and the keys under which similar documents meet.

    `tokens` are those of the documents of `table`. Licence headers are left out.
    """
    folder = run.work / "filter"
    tokens = without_first(tokens, header_tokens(table["text"].to_pylist()))
    signed, sketched = [np.empty((0, minhash.VALUES), np.uint32)], []
    for _, piece in token_pieces(tokens):
        signed.append(minhash.signatures(piece))
        if sketch is not None:
            sketched.append(sketch.sketch(piece))
    signature = np.concatenate(signed)
    columns = table.select(["doc", "source", "language", "score"])
    columns = columns.append_column("bytes", pc.cast(pc.binary_length(table["text"]), pa.int64()))
    columns = columns.append_column("signature", binary_rows(signature))
    if sketch is not None:
        features = np.concatenate([np.empty((0, sketch.config.dim), np.float16), *sketched])
        columns = columns.append_column("feature", binary_rows(features))
    (folder / "features").write_table(f"{name}.parquet", columns)
    index, keys = minhash.bands(signature)
    order = np.argsort(keys, kind="stable")
    bands = pa.table({"key": keys[order], "doc": table["doc"].to_numpy()[index[order]]})
    (folder / "bands").write_table(f"{name}.parquet", bands)
