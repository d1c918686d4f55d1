"""Conversions between checkpoints, PyTorch folders and GGUF: little memory, and a complete target or none."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, hf_write, orbax
from bc2_jax.convert.checkpoints import model_metadata
from bc2_jax.convert.checksums import verify_file
from bc2_jax.convert.folder import (
    Foreign,
    check_free,
    foreign_in_checkpoint,
    foreign_in_export,
    foreign_in_gguf,
    written_whole,
)
from bc2_jax.convert.gguf import GGUFType, check_gguf, write_gguf
from bc2_jax.convert.hf_config import HFDType
from bc2_jax.convert.reading import Reading
from bc2_jax.convert.source import Source, open_source
from bc2_jax.convert.stream import HEAD, Stream, digest_part, fingerprint, in_order, row_blocks
from bc2_jax.convert.table import Layout, Reader, read_layer
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import check_path, join_some

EMBEDDING = "embed_tokens.weight"
NO_PROGRESS = (lambda total: None, lambda done: None)
Progress = tuple[Callable[[int], None], Callable[[int], None]]
"""(called once with the total bytes, called with the bytes of each part)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all conversions."""

    strict: bool = False
    """Refuse values that are not finite; otherwise the summary names them."""
    overwrite: bool = False
    """Replace a target that contains only what a conversion wrote."""
    verify: bool = False
    """Read the result back and compare every part."""
    resize_vocab: int | None = None
    """Grow the vocabulary to this many token ids."""
    allow_unused_rows: bool = False
    """Accept a vocabulary larger than the tokenizer's."""
    check_hashes: bool = True
    """Compare the source's files with their known checksums."""
    reading: Reading = Reading()
    """How to read a PyTorch folder that does not say so itself."""
    progress: Progress = NO_PROGRESS


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a conversion."""

    target: Path
    config: ModelConfig
    tensors: int
    """Number of parameter arrays; a stacked array counts once."""
    bytes_read: int
    bytes_written: int
    seconds: float
    fingerprint: str
    """`stream.fingerprint` of the result; the same in every format."""
    not_finite: tuple[str, ...]
    hashed_files: int | None
    """Source files whose checksum is known and right; None if not checked."""
    notes: tuple[str, ...]
    """Sentences on choices made by default and on what was left out."""


def to_orbax(
    folder: str | Path, checkpoint: str | Path, options: Options = Options(), dtype: HFDType | None = None
) -> Summary:
    """Writes the model in `folder` as a params-only checkpoint, in the dtype of its files or in `dtype`.

    Peak memory is a few layers' tensors and one embedding table. Raises FileNotFoundError, FileExistsError,
    `files.InUse` (another process is writing the target) or ValueError, and then leaves nothing behind.
    """
    target = Path(checkpoint).absolute()
    check_path("target", target)
    check_free(target, options.overwrite, foreign_in_checkpoint)
    source = prepare(open_source(folder, options.reading), options)
    stream = open_stream(source, options, None if dtype is None else hf.DTYPES[dtype])
    arrays = {path: (shape, stream.dtype_of(path)) for path, shape in source.shapes.items()}

    def write(partial: Path) -> None:
        metadata = model_metadata(source.config, source.generation, source.chat_template)
        orbax.write_params(partial, arrays, metadata, stream.read)
        if source.tokenizer is not None:
            shutil.copyfile(source.tokenizer, partial / TOKENIZER_NAME)
        if options.verify:
            stored = orbax.open_arrays(partial)
            _verify(stream, lambda path, layer: orbax.read_part(stored[path], layer))

    return run_conversion(stream, target, foreign_in_checkpoint, options, write, _notes(source))


def to_hf(
    checkpoint: str | Path,
    folder: str | Path,
    options: Options = Options(),
    dtype: HFDType | None = None,
    layout: Layout = "baichuan2",
    file_format: hf_write.FileFormat = "safetensors",
    max_shard_bytes: float = 5e9,
    change: Callable[[Source, np.dtype], Source] = lambda source, dtype: source,
) -> Summary:
    """Writes a checkpoint (or a PyTorch folder) as a PyTorch folder.

    `dtype` None is the source's, or bfloat16 for a training checkpoint, as models are released. `layout` "baichuan2" is
    the released one with unnormalised head rows; "baichuan1" has normalised rows, for engines without NormHead; "llama"
    is LlamaForCausalLM's, for RoPE models. `change` replaces the opened source, given the dtype to write. Raises as
    `to_orbax`.
    """
    target = Path(folder).absolute()
    check_free(target, options.overwrite, foreign_in_export)
    source = prepare(open_source(checkpoint, options.reading), options)
    dtype, notes = (dtype, ()) if dtype is not None else _choose_dtype(source)
    hf_write.check_layout(source.config, layout)
    source = change(source, hf.DTYPES[dtype])
    stream = open_stream(source, options, hf.DTYPES[dtype], normalize_head=layout != "baichuan2")

    def write(partial: Path) -> None:
        hf_write.write_folder(stream, partial, dtype, layout, file_format, max_shard_bytes)
        if options.verify:
            tensors = hf.open_folder(partial)
            hf.check_tensors(source.config, tensors, layout)
            _verify(stream, lambda p, i: read_layer(source.config, lambda n: tensors[n].read(), p, i, layout))

    return run_conversion(stream, target, foreign_in_export, options, write, (*notes, *_notes(source)))


def to_gguf(checkpoint: str | Path, file: str | Path, options: Options = Options(), kind: GGUFType = "f16") -> Summary:
    """Writes a model as one GGUF file for llama.cpp. Raises as `to_orbax`."""
    target = Path(file).absolute()
    check_free(target, options.overwrite, foreign_in_gguf)
    source = prepare(open_source(checkpoint, options.reading), options)
    check_gguf(source.config, kind)
    stream = open_stream(source, options, np.dtype(np.float32), normalize_head=True)
    notes = _notes(source, () if source.generation is None else ("generation_config.json",))
    return run_conversion(stream, target, foreign_in_gguf, options, lambda file: write_gguf(stream, file, kind), notes)


def _choose_dtype(source: Source) -> tuple[HFDType, tuple[str, ...]]:
    """The default dtype of a PyTorch folder, and notes on that choice."""
    kinds = {dtype.name for dtype in source.dtypes.values()}
    if source.is_training:
        note = "written as bfloat16, as models are released; --dtype float32 keeps the master weights of the run"
        return "bfloat16", (note,) * (kinds != {"bfloat16"})
    for name in get_args(HFDType):
        if kinds == {name}:
            return name, ()
    return "float32", (f"written as float32, which holds the source's {', '.join(sorted(kinds))} exactly",)


def _notes(source: Source, also: tuple[str, ...] = ()) -> tuple[str, ...]:
    left_out = (*source.unread, *also)
    return (f"not carried over: {join_some(left_out)}",) if left_out else ()


def prepare(source: Source, options: Options) -> Source:
    """The source with the requested vocabulary. Raises ValueError if it does not match the tokenizer."""
    if options.resize_vocab is not None:
        source = resize_vocab(source, options.resize_vocab)
    check_vocabulary(source, options.allow_unused_rows or options.resize_vocab is not None)
    return source


def open_stream(source: Source, options: Options, dtype: np.dtype | None, normalize_head: bool = False) -> Stream:
    """A stream of the source that reports its progress."""
    announce, advance = options.progress
    announce(source.num_bytes)
    return Stream(source, dtype, normalize_head, options.strict, advance)


def run_conversion(
    stream: Stream, target: Path, foreign: Foreign, options: Options, write: Callable[[Path], None],
    notes: tuple[str, ...],
) -> Summary:  # fmt: skip
    """Calls `write` with a temporary path that becomes `target`, while the source's files are checked by checksum."""
    begin, source = time.perf_counter(), stream.source
    files = source.files if options.check_hashes else ()
    with written_whole(target, options.overwrite, foreign) as partial:
        pool = ThreadPoolExecutor(1)
        checks = [pool.submit(verify_file, file, source.manifested.get(file)) for file in files]
        try:
            write(partial)
            hashed = [check.result() for check in checks]
        finally:
            pool.shutdown(cancel_futures=True)
    written = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    return Summary(
        target, source.config, len(source.dtypes), source.num_bytes, sum(file.stat().st_size for file in written),
        time.perf_counter() - begin, fingerprint(stream.digests.values()), tuple(stream.not_finite),
        sum(hashed) if files else None, notes,
    )  # fmt: skip


def _verify(stream: Stream, read: Reader) -> None:
    parts = stream.source.parts()
    digests = in_order(lambda part: digest_part(part, read(*part)), parts)
    for part, digest in zip(parts, digests, strict=True):
        if digest != stream.digests[part]:
            raise ValueError(
                f"{part[0]} (layer {part[1]}) reads back differently from what was written: the disk is bad."
            )


def check_vocabulary(source: Source, allow_unused_rows: bool = False) -> None:
    """Raises ValueError if the vocabulary does not match the tokenizer beside the model.

    A larger vocabulary (padded, or grown for future pieces) is legal with `allow_unused_rows`. A smaller one never is:
    the tokenizer would give ids without a row.
    """
    if source.tokenizer is None:
        return
    pieces, rows = Tokenizer(str(source.tokenizer)).vocab_size, source.config.vocab_size
    if pieces > rows:
        raise ValueError(
            f"vocab_size = {rows} is not valid: {source.tokenizer} has {pieces} pieces; "
            f"--resize-vocab {pieces} grows it."
        )
    if pieces < rows and not allow_unused_rows:
        raise ValueError(
            f"vocab_size = {rows} is not that of {source.tokenizer}, which has {pieces} pieces; pass "
            "--allow-unused-rows if the vocabulary was padded or grown on purpose."
        )


def resize_vocab(source: Source, size: int, seed: int = 0) -> Source:
    """The same model with `size` token ids; old rows keep their bits, new ones come from `new_rows`.

    Raises ValueError for fewer rows, which would lose tokens.
    """
    old = source.config.vocab_size
    if size < old:
        raise ValueError(f"--resize-vocab {size} is not valid: the model has {old} token ids, and none may be lost.")

    def read(path: str, layer: int | None) -> np.ndarray:
        array = source.read(path, layer)
        if path not in (EMBEDDING, HEAD):
            return array
        # Each table has its own generator, so the order of reading does not matter.
        generator = np.random.default_rng([seed, int(path == HEAD)])
        unit = path == HEAD and source.config.normalize_head
        return np.concatenate([array, new_rows(array, size - old, unit, generator)])

    return dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=size), read=read)


def new_rows(rows: np.ndarray, count: int, unit: bool, generator: np.random.Generator) -> np.ndarray:
    """[count, D] rows for new tokens: the mean of the old rows plus Gaussian noise up to their usual length.

    Their inner product with a hidden state is about the mean one, and no two are equal. With `unit` (NormHead) the
    directions of old rows are averaged, because their lengths have no effect; a row of zeros, which would give 0 / 0
    there, cannot occur.
    """
    total, squares, lengths = np.zeros(rows.shape[1]), 0.0, 0.0
    for block in row_blocks(rows):
        block = block.astype(np.float32)
        norms = np.sqrt(np.sum(block * block, axis=1, keepdims=True))
        lengths += float(norms.sum())
        if unit:
            block = block / np.maximum(norms, 1e-12)
        total += block.sum(axis=0, dtype=np.float64)
        squares += float(np.sum(block * block, dtype=np.float64))
    mean = total / len(rows)
    missing = max(squares / len(rows) - float(mean @ mean), 0.0)
    noise = generator.standard_normal((count, rows.shape[1]), dtype=np.float32) * np.sqrt(missing / rows.shape[1])
    scale = lengths / len(rows) if unit else 1.0
    return ((mean + noise) * scale).astype(rows.dtype)
