"""What happens to one shard: functions that read files, write files and return counts, in the order of the pipeline.

Each takes the run, which is pickled to where the task runs, and a task: the shard's name and little else.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import minhash, spans
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Task
from bc2_jax.curate.shards import Account, decisions_for, first_document
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.tokens import hash_tokens

# A span is numbered shard << SPAN_BITS | place, where a shard is its first document's number >> 20.
SPAN_BITS = 30
_DOCUMENT_BITS = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """What every task knows."""

    work: Folder
    """Folder of the stages."""
    out: Folder
    """Folder of the result."""
    config: CurationConfig


def find_spans(run: Run, task: Task) -> Task:
    """Lists the paragraphs and sentences that could be copies of others."""
    config, name = run.config.copies, task["name"]
    table = (run.work / "filter" / "shards").read_table(f"{name}.parquet", ["text", "language"])
    looked_at = np.flatnonzero(~np.isin(table["language"].to_numpy(), config.whole_languages))
    texts = table["text"].take(pa.array(looked_at)).to_pylist()
    found = spans.find_spans(texts, config.shortest_paragraph, config.shortest_sentence)
    shard = first_document(name) >> _DOCUMENT_BITS
    numbers = (np.int64(shard) << SPAN_BITS) + np.arange(len(found.hash), dtype=np.int64)
    # Sorted, so that a range of hashes is a range of row groups.
    order = np.argsort(found.hash, kind="stable")
    size = (found.stop - found.start).astype(np.int64)
    hashes = pa.table({"hash": found.hash[order], "size": (size * 2 + found.kind)[order], "span": numbers[order]})
    (run.work / "spans" / "hashes").write_table(f"{name}.parquet", hashes)
    places = {"row": looked_at[found.document].astype(np.int32), "start": found.start, "stop": found.stop}
    (run.work / "spans" / "places").write_table(f"{name}.parquet", pa.table(places))
    return {"spans": len(numbers)}


def cut_spans(run: Run, task: Task) -> Task:
    """Cuts the copies out of the texts, and drops documents of which too little is left."""
    config, name = run.config.copies, task["name"]
    table = (run.work / "filter" / "shards").read_table(f"{name}.parquet")
    account = Account(table)
    copies = decisions_for(run.work / "spans" / "copies", name, "span", SPAN_BITS - _DOCUMENT_BITS)
    places = (run.work / "spans" / "places").read_table(f"{name}.parquet")
    wanted = copies["span"].to_numpy() & ((1 << SPAN_BITS) - 1)
    row, start, stop = (places[column].to_numpy()[wanted] for column in ("row", "start", "stop"))
    rows, first = np.unique(row, return_index=True)
    bounds = np.append(first, len(row))
    before = pc.binary_length(table["text"]).to_numpy()
    texts = table["text"].take(pa.array(rows)).to_pylist()
    shorter = [
        spans.cut_spans(text, start[low:high].tolist(), stop[low:high].tolist())
        for text, low, high in zip(texts, bounds[:-1], bounds[1:], strict=True)
    ]
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    text = pc.replace_with_mask(table["text"].combine_chunks(), pa.array(mask), pa.array(shorter, pa.large_string()))
    # A document that lost most of itself is not worth the rest.
    after = pc.binary_length(text).to_numpy()
    lost = mask & (after < np.maximum(before * config.least_left, config.least_left_bytes))
    gone = np.flatnonzero(lost)
    reasons = [f"{after[i]} of {before[i]} bytes are no copies" for i in gone]
    account.count("spans", 0, int((before - after)[mask & ~lost].sum()))
    table = account.drop(table, "spans", gone, reasons)
    kept_text = text.filter(pa.array(~lost))
    table = table.set_column(table.column_names.index("text"), "text", kept_text)
    folder = run.work / "cut"
    (folder / "shards").write_table(f"{name}.parquet", table)
    (folder / "removed").write_table(f"{name}.parquet", account.removed)
    return account.result(table) | {"cut_spans": len(row), "cut_documents": len(rows)}


def sign(run: Run, task: Task) -> Task:
    """MinHash signatures, and the keys under which similar documents meet."""
    name, folder = task["name"], run.work / "sign"
    table = (run.work / "cut" / "shards").read_table(f"{name}.parquet", ["doc", "text"])
    documents = table["doc"].to_numpy()
    signature = minhash.signatures(hash_tokens(table["text"].to_pylist()))
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(minhash.VALUES * 4), len(signature), [None, pa.py_buffer(signature.tobytes())]
    )
    (folder / "signatures").write_table(f"{name}.parquet", pa.table({"doc": documents, "signature": binary}))
    index, keys = minhash.bands(signature)
    order = np.argsort(keys, kind="stable")
    bands = pa.table({"key": keys[order], "doc": documents[index[order]]})
    (folder / "bands").write_table(f"{name}.parquet", bands)
    return {"bands": len(keys)}


def jsonl(table: pa.Table) -> bytes:
    """One object a line."""
    import json

    lines = io.StringIO()
    for row in table.to_pylist():
        lines.write(json.dumps(row, ensure_ascii=False))
        lines.write("\n")
    return lines.getvalue().encode()


def result_rows(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The columns of a finished document."""
    return table.select(["id", "text", "source", "language"])
