"""Packed rows -> batches, with random access by step.

The batch of a step is a function of the step and the settings (Grain's MapDataset and the arithmetic of `mixture`), so
the whole state of an iterator is the next step. Resuming is exact and instant, on any number of processes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bc2_jax.config import DataConfig
from bc2_jax.data.batch import Rows, row_to_example
from bc2_jax.data.corpus import PartFolder, list_parts
from bc2_jax.data.mixture import Mixture, Stage
from bc2_jax.data.packing import Kind, RowManifest, Split, check_files
from bc2_jax.data.row_file import BadRow, BadRows, RowFile
from bc2_jax.files import file_sha256
from bc2_jax.tokenizer import PAD_ID

if TYPE_CHECKING:
    import grain


def make_train_loader(
    data: DataConfig, *, process_index: int, process_count: int, num_steps: int | None = None,
    done: tuple[int, int] = (0, 0), first_row: int = 0, bad_rows: BadRows | None = None,
) -> grain.MapDataset[Rows]:  # fmt: skip
    """The endless training batches of one process: `loader[i]` has the FIELDS of `batch`, int32 [B, T].

    B = global_batch_size / process_count; batch 0 begins with row `first_row` of the run. A process has a contiguous
    slice of the global batch, so the concatenated batches do not depend on process_count. Each part of a source is
    shuffled again in every epoch; parts are interleaved by their shares of tokens (`mixture.Interleave`).

    An unreadable row becomes padding, so that the others keep their places; beyond the limit of `bad_rows` (default:
    data.max_bad_rows) `loader[step]` raises ValueError, naming the row.

    Raises FileNotFoundError or ValueError, naming the field, if rows are missing or were not made for `data`, or if a
    run of `num_steps` that has `done` (steps, rows) would read a source more often than its max_epochs.
    """
    import grain

    local = _local_batch_size("data.global_batch_size", data.global_batch_size, process_index, process_count)
    parts = _open_parts(data, bad_rows)
    mixture = _make_mixture(data, parts)
    if num_steps is not None:
        _check_epochs(data, parts, mixture, num_steps, done)
    rows = grain.MapDataset.source(mixture)[first_row:] if first_row else grain.MapDataset.source(mixture)
    return _make_batches(rows, local, process_index, process_count)


class PartUse(NamedTuple):
    """What a run reads of a folder of packed rows."""

    path: str
    rows: int
    shares: tuple[float, ...]
    """Of the training tokens of each stage."""
    rows_read: int
    kind: Kind

    @property
    def epochs(self) -> float:
        return self.rows_read / self.rows


def describe_mixture(data: DataConfig, num_rows: int) -> list[PartUse]:
    """How often a run of `num_rows` reads each part of each source. Raises as `make_train_loader` does."""
    parts = _open_parts(data)
    mixture = _make_mixture(data, parts)
    stages = _stages(data, parts)
    read = mixture.rows_read(num_rows)
    return [
        PartUse(
            str(part.folder.path), len(part.rows),
            tuple(stage.shares[index] / sum(stage.shares) for stage in stages), int(read[index]),
            part.folder.manifest.kind,
        )
        for index, part in enumerate(parts)
    ]  # fmt: skip


def make_validation_batches(
    data: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1,
    bad_rows: BadRows | None = None,
) -> grain.MapDataset[Rows]:  # fmt: skip
    """All held-out rows of all sources once, as `make_batches_of` gives them."""
    return make_batches_of(
        ("validation",), data, batch_size, process_index=process_index, process_count=process_count, bad_rows=bad_rows
    )


def make_batches_of(
    splits: Sequence[Split], data: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1,
    bad_rows: BadRows | None = None,
) -> grain.MapDataset[Rows]:  # fmt: skip
    """All rows of `splits` of all sources once, in the order of the text, as batches of int32 [B, T].

    B = batch_size / process_count. Rows of padding, whose labels are all -100, fill the last batch and replace
    unreadable rows. Raises as `make_train_loader`, and ValueError if there are no rows.
    """
    import grain

    local = _local_batch_size("batch_size", batch_size, process_index, process_count)
    tokenizer_sha256 = _tokenizer_sha256(data)
    bad_rows = BadRows(data.max_bad_rows) if bad_rows is None else bad_rows
    sources = [
        grain.MapDataset.source(rows)
        for split in splits
        for source in data.sources
        for folder in list_parts(source.path)
        if len(rows := _open_rows(folder, data, split, tokenizer_sha256, bad_rows))
    ]
    if not sources:
        paths = ", ".join(source.path for source in data.sources)
        lack = "rows" if "train" in splits else "held-out rows; pack with a larger fraction"
        raise ValueError(f"data.sources = {paths} are not valid: none has {lack}.")
    missing = -sum(map(len, sources)) % batch_size
    if missing:
        sources.append(grain.MapDataset.source([_padding_row(data.sequence_length)] * missing))
    return _make_batches(grain.MapDataset.concatenate(sources), local, process_index, process_count)


def make_train_iterator(loader: grain.MapDataset[Rows], *, read_ahead: int = 2) -> grain.DatasetIterator[Rows]:
    """Iterates from step 0, preparing up to `read_ahead` batches on a thread.

    `get_state()` is {"next_index": next step}, which does not depend on what was read ahead; `set_state()` takes it.
    """
    import grain

    # One thread: an element is a whole batch, and numpy holds the interpreter lock for most of one.
    options = grain.ReadOptions(num_threads=1 if read_ahead else 0, prefetch_buffer_size=read_ahead)
    return iter(loader.to_iter_dataset(options))


def _make_batches(
    rows: grain.MapDataset[bytes], local_batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset[Rows]:
    # Batching before slicing keeps a process's rows contiguous and never reads those of others. Without drop_remainder
    # Grain computes the length in floating point, which overflows for endless rows.
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


class _Part(NamedTuple):
    """The training rows of a part, and its index in `data.sources`."""

    source: int
    folder: PartFolder
    rows: _Rows
    share: float
    """Of its source."""


def _open_parts(data: DataConfig, bad_rows: BadRows | None = None) -> list[_Part]:
    """All parts with training rows, in the order of the sources."""
    tokenizer_sha256 = _tokenizer_sha256(data)
    bad_rows = BadRows(data.max_bad_rows) if bad_rows is None else bad_rows
    parts: list[_Part] = []
    for index, source in enumerate(data.sources):
        folders = list_parts(source.path)
        opened = [(folder, _open_rows(folder, data, "train", tokenizer_sha256, bad_rows)) for folder in folders]
        opened = [(folder, rows) for folder, rows in opened if len(rows)]
        if not opened:
            raise ValueError(f"data.sources.path = {source.path!r} is not valid: it has no training rows.")
        needed = 1 + max(folder.bucket for folder, _ in opened)
        if source.quality_weights and len(source.quality_weights) < needed:
            raise ValueError(
                f"data.sources.quality_weights = {source.quality_weights} is not valid: {source.path!r} has "
                f"{needed} quality buckets, and each needs one."
            )
        factors = source.quality_weights or (1.0,) * needed
        shares = [len(rows) * folder.mean_weight * factors[folder.bucket] for folder, rows in opened]
        if not sum(shares):
            raise ValueError(
                f"data.sources.quality_weights = {source.quality_weights} is not valid: nothing of {source.path!r} "
                "would be read."
            )
        parts += [_Part(index, *part, share / sum(shares)) for part, share in zip(opened, shares, strict=True)]
    return parts


def _stages(data: DataConfig, parts: Sequence[_Part]) -> list[Stage]:
    weights = [[source.weight for source in data.sources], *(stage.weights for stage in data.stages)]
    starts = [0, *data.stage_rows]
    return [
        Stage(start, tuple(weight[part.source] * part.share for part in parts))
        for start, weight in zip(starts, weights, strict=True)
    ]


def _make_mixture(data: DataConfig, parts: Sequence[_Part]) -> Mixture:
    import grain

    datasets: list[grain.MapDataset[bytes]] = []
    for part in parts:
        # A seed of its own for each part, which does not depend on the sources after it.
        number = [data.seed, part.source, sum(other.source == part.source for other in parts[: len(datasets)])]
        seed = int(np.random.SeedSequence(number).generate_state(1)[0])
        datasets.append(grain.MapDataset.source(part.rows).shuffle(seed=seed).repeat())
    return Mixture(datasets, _stages(data, parts))


def _check_epochs(
    data: DataConfig, parts: Sequence[_Part], mixture: Mixture, num_steps: int, done: tuple[int, int]
) -> None:
    for index, part in enumerate(parts):
        limit = data.sources[part.source].max_epochs
        if limit is None:
            continue

        def epochs(steps: int, index: int = index, part: _Part = part) -> float:
            rows = done[1] + max(steps - done[0], 0) * data.global_batch_size
            return mixture.rows_read(rows)[index] / len(part.rows)

        if epochs(num_steps) > limit:
            steps = bisect.bisect_right(range(num_steps), limit, key=epochs) - 1
            raise ValueError(
                f"data.sources.max_epochs = {limit} is not valid: a run of {num_steps} steps reads "
                f"the {len(part.rows)} rows of {str(part.folder.path)!r} {epochs(num_steps):.3g} times; it must be at "
                f"least {math.ceil(100 * epochs(num_steps)) / 100}, or num_steps at most {steps}."
            )


class _Rows:
    """The rows of one split of a part as records; a source of data for Grain. Bad ones are rows of padding."""

    def __init__(self, folder: PartFolder, split: Split, bad_rows: BadRows) -> None:
        length = folder.manifest.sequence_length
        self._files = [RowFile(folder.path, info, length) for info in folder.manifest.split(split).files]
        self._first = list(itertools.accumulate((file.rows for file in self._files), initial=0))
        self._bad_rows, self._padding = bad_rows, _padding_row(length)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> bytes:
        file = bisect.bisect_right(self._first, index) - 1
        try:
            return self._files[file].read(index - self._first[file])
        except BadRow as bad:
            self._bad_rows.add(bad)
            return self._padding


def _padding_row(sequence_length: int) -> bytes:
    """A record of pad tokens, [T + 1]: all its labels are ignored."""
    return np.full(sequence_length + 1, PAD_ID, "<u4").tobytes()


def _open_rows(folder: PartFolder, data: DataConfig, split: Split, tokenizer_sha256: str, bad_rows: BadRows) -> _Rows:
    """One split of a part, checked against `data` and its manifest; rows are checked when they are read."""
    _check_manifest(folder.manifest, folder.path, data, tokenizer_sha256)
    check_files(folder.path, folder.manifest, split)
    return _Rows(folder, split, bad_rows)


def _check_manifest(manifest: RowManifest, path: Path, data: DataConfig, tokenizer_sha256: str) -> None:
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise ValueError(
            f"data.tokenizer = {data.tokenizer!r} is not valid: the rows of {str(path)!r} were made with another "
            f"tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}, not {tokenizer_sha256[:12]})."
        )
    if manifest.sequence_length != data.sequence_length:
        raise ValueError(
            f"data.sequence_length = {data.sequence_length} is not valid: the rows of {str(path)!r} have "
            f"{manifest.sequence_length}."
        )


# What decides which rows each step reads: saved with a checkpoint, compared when a run resumes from it.


def record_row_order(data: DataConfig) -> dict[str, Any]:
    """JSON values by field; equal for equal rows in the same order, wherever their folders are."""
    record: dict[str, Any] = {
        "data.seed": data.seed,
        "data.sequence_length": data.sequence_length,
        "data.stages": [[stage.start_tokens, *stage.weights] for stage in data.stages],
    }
    for index, source in enumerate(data.sources):
        digest = hashlib.sha256()
        for part in list_parts(source.path):
            files = [[info.sha256, info.rows] for info in part.manifest.train.files]
            digest.update(json.dumps([part.bucket, part.mean_weight, files]).encode())
        name = f"data.sources.{index}"
        record |= {f"{name}.rows": digest.hexdigest(), f"{name}.weight": source.weight}
        record[f"{name}.quality_weights"] = list(source.quality_weights)
    return record


def changed_row_order(recorded: dict[str, Any], data: DataConfig, tokens: int) -> list[str]:
    """The fields of `record_row_order` that have changed since the run had trained on `tokens`.

    Stages that begin later may be added, changed and removed: they have read nothing yet.
    """
    now = record_row_order(data)
    before, after = ([s for s in r.get("data.stages", ()) if s[0] < tokens] for r in (recorded, now))
    recorded, now = recorded | {"data.stages": before}, now | {"data.stages": after}
    # Earlier versions recorded the batch size too, on which the order does not depend.
    return sorted(name for name in now if recorded.get(name) != now[name]) + sorted(
        name for name in recorded if name not in now and name != "data.global_batch_size"
    )
