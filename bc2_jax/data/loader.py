"""Packed rows -> batches, with random access by step.

Only Grain MapDataset operations are used, so the batch of a step is a function of the step and the settings. The whole
state of an iterator is the next step: resuming is exact, takes no longer than any other step, and may happen on another
number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data.packing import Manifest, Split, check_files, load_manifest
from bc2_jax.tokenizer import EOS_ID, PAD_ID, file_sha256

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
IGNORED = -100
"""Label of a position that has no target."""


def row_to_example(row: np.ndarray, eos_id: int = EOS_ID, pad_id: int = PAD_ID) -> Batch:
    """Splits rows of T + 1 tokens, uint32 [..., T + 1], into what the model trains on, each int32 [..., T].

    input_ids: the first T tokens. labels: the next token of each; -100 after an eos, because the first token of a
    document has no context in it, and where there is padding. segment_ids: 1, 2, ... by document, 0 for padding.
    positions: count from 0 in each segment; 0 for padding. A document that goes on from the row before starts anew.
    """
    tokens = row.astype(np.int32)
    input_ids, targets = tokens[..., :-1], tokens[..., 1:]
    ends = input_ids == eos_id
    padding = input_ids == pad_id
    starts = np.zeros_like(ends)
    starts[..., 0] = True
    starts[..., 1:] = ends[..., :-1]
    index = np.arange(input_ids.shape[-1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return {
        "input_ids": input_ids,
        "labels": np.where(ends | padding | (targets == pad_id), np.int32(IGNORED), targets),
        "segment_ids": np.where(padding, 0, np.cumsum(starts, axis=-1, dtype=np.int32)).astype(np.int32),
        "positions": np.where(padding, 0, positions).astype(np.int32),
    }


def make_train_loader(data: DataConfig, *, process_index: int, process_count: int) -> grain.MapDataset[Batch]:
    """The endless training batches of one process: `loader[step]` has what `row_to_example` gives, int32 [B, T].

    B = global_batch_size / process_count. A process holds a contiguous slice of the global batch, so the batches of
    all processes, put together in order, are the same for every process_count. Each source is shuffled anew in every
    epoch; sources are interleaved by weight, counted in rows and kept to 0.5 % of the smallest weight.

    Raises FileNotFoundError or ValueError, naming the field, if the rows are not there or were not made for `data`.
    """
    import grain

    local = _local_batch_size("data.global_batch_size", data.global_batch_size, process_index, process_count)
    tokenizer_sha256 = _tokenizer_sha256(data)
    sources = []
    for index, source in enumerate(data.sources):
        rows = _open_rows(source, data, "train", tokenizer_sha256)
        if len(rows) == 0:
            raise ValueError(f"data.sources.path = {source.path!r} is not valid: it has no training rows.")
        seed = int(np.random.SeedSequence([data.seed, index]).generate_state(1)[0])
        sources.append(rows.shuffle(seed=seed).repeat())
    # Grain scales the weights to a minimum of 100 and truncates; rounding first keeps float error out of the shares.
    smallest = min(source.weight for source in data.sources)
    mixed = grain.MapDataset.mix(sources, [round(100 * source.weight / smallest) for source in data.sources])
    return _make_batches(mixed, local, process_index, process_count)


def make_validation_batches(
    data: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Batch]:
    """All held-out rows of all sources once, in the order of the text, as `len()` batches of int32 [B, T].

    B = batch_size / process_count. The last batch is filled with rows of padding, whose labels are all -100, so that
    every batch has one shape. Raises as `make_train_loader` does, and ValueError if nothing is held out.
    """
    import grain

    local = _local_batch_size("batch_size", batch_size, process_index, process_count)
    tokenizer_sha256 = _tokenizer_sha256(data)
    sources = [_open_rows(source, data, "validation", tokenizer_sha256) for source in data.sources]
    sources = [rows for rows in sources if len(rows)]
    if not sources:
        paths = ", ".join(source.path for source in data.sources)
        raise ValueError(f"data.sources = {paths} are not valid: none has held-out rows; pack with a larger fraction.")
    missing = -sum(map(len, sources)) % batch_size
    if missing:
        padding = np.full(data.sequence_length + 1, PAD_ID, "<u4").tobytes()
        sources.append(grain.MapDataset.source([padding] * missing))
    return _make_batches(grain.MapDataset.concatenate(sources), local, process_index, process_count)


def make_train_iterator(loader: grain.MapDataset[Batch], *, read_ahead: int = 2) -> grain.DatasetIterator[Batch]:
    """Iterates from step 0, preparing up to `read_ahead` batches on a thread.

    `get_state()` is {"next_index": next step}, whatever was read ahead; `set_state()` takes it, also after JSON.
    """
    import grain

    # One thread: an element is a whole batch, and numpy holds the interpreter lock for most of one.
    options = grain.ReadOptions(num_threads=1 if read_ahead else 0, prefetch_buffer_size=read_ahead)
    return iter(loader.to_iter_dataset(options))


def _make_batches(
    rows: grain.MapDataset[bytes], local_batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset[Batch]:
    # Batching before slicing makes a process's rows contiguous, and rows of other processes are never read. Without
    # drop_remainder Grain computes the length in floating point, which overflows for endless rows.
    batches = rows.batch(local_batch_size, drop_remainder=True, batch_fn=_stack_rows)
    return batches[process_index::process_count].map(row_to_example)


def _stack_rows(records: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(records), "<u4").reshape(len(records), -1)


def _local_batch_size(field: str, batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index} is not valid: it must be in 0..{process_count - 1}.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"{field} = {batch_size} is not valid: it must be a multiple of the {process_count} processes."
        )
    return batch_size // process_count


def _tokenizer_sha256(data: DataConfig) -> str:
    if not Path(data.tokenizer).is_file():
        raise FileNotFoundError(f"data.tokenizer = {data.tokenizer!r} is not a file: a SentencePiece model is needed.")
    return file_sha256(data.tokenizer)


def _open_rows(source: SourceConfig, data: DataConfig, split: Split, tokenizer_sha256: str) -> grain.MapDataset[bytes]:
    """One split of a source as records, checked against `data`; sizes are compared, contents are not hashed."""
    import grain

    manifest = load_manifest(source.path)
    _check_manifest(manifest, source, data, tokenizer_sha256)
    info = manifest.split(split)
    if not info.files:
        return grain.MapDataset.source([])
    check_files(source.path, info)
    records = grain.sources.ArrayRecordDataSource([str(Path(source.path, file.name)) for file in info.files])
    if len(records) != info.rows:
        raise ValueError(
            f"data.sources.path = {source.path!r} is damaged: {len(records)} {split} rows where its manifest says "
            f"{info.rows}."
        )
    return grain.MapDataset.source(records)


def _check_manifest(manifest: Manifest, source: SourceConfig, data: DataConfig, tokenizer_sha256: str) -> None:
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise ValueError(
            f"data.tokenizer = {data.tokenizer!r} is not valid: the rows of {source.path!r} were made with another "
            f"tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}, not {tokenizer_sha256[:12]})."
        )
    if manifest.sequence_length != data.sequence_length:
        raise ValueError(
            f"data.sequence_length = {data.sequence_length} is not valid: the rows of {source.path!r} have "
            f"{manifest.sequence_length}."
        )
