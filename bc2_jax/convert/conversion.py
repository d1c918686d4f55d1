"""Checkpoints of ours from PyTorch folders and back, with little in memory and nothing half-done under a final name."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, hf_write, orbax
from bc2_jax.convert.checksums import verify_file
from bc2_jax.convert.folder import check_free, written_whole
from bc2_jax.convert.gguf import GGUFType, check_gguf, write_gguf
from bc2_jax.convert.hf_config import HFDType
from bc2_jax.convert.ownership import foreign_in_checkpoint, foreign_in_export, foreign_in_gguf
from bc2_jax.convert.reading import Reading
from bc2_jax.convert.source import Source, open_source
from bc2_jax.convert.stream import Stream, digest_part, fingerprint, in_order
from bc2_jax.convert.table import Layout, layers_of, param_shapes, read_layer
from bc2_jax.convert.vocabulary import check_vocabulary, resize_vocab
from bc2_jax.validation import check_path, join_some

NO_PROGRESS = (lambda total: None, lambda done: None)
Progress = tuple[Callable[[int], None], Callable[[int], None]]
"""What is told (the bytes to read, each number of bytes read)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What all conversions have in common."""

    strict: bool = False
    """Refuse values that are not finite; otherwise they are named in the summary."""
    overwrite: bool = False
    """Replace a target that holds nothing but what a conversion wrote."""
    verify: bool = False
    """Read the result again and compare every part with what was meant to be written."""
    resize_vocab: int | None = None
    """Grow the vocabulary to this many token ids."""
    allow_unused_rows: bool = False
    """Accept a vocabulary larger than the tokenizer."""
    check_hashes: bool = True
    """Compare the source's files with the hashes that are known of them."""
    reading: Reading = Reading()
    """How to read a PyTorch folder, as far as its files do not say so."""
    progress: Progress = NO_PROGRESS


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    target: Path
    config: ModelConfig
    tensors: int
    """Arrays of ours, a stacked one once."""
    bytes_read: int
    bytes_written: int
    seconds: float
    fingerprint: str
    """Of the result, `stream.fingerprint`: the same in either format."""
    not_finite: tuple[str, ...]
    hashed_files: int | None
    """Source files whose hash was known and right; None where they were not checked."""
    notes: tuple[str, ...]
    """Sentences on what was decided or left out without being asked."""


def to_orbax(
    folder: str | Path, checkpoint: str | Path, options: Options = Options(), dtype: HFDType | None = None
) -> Summary:
    """Writes the model in `folder` as a params-only checkpoint, in the dtype of its files or in `dtype`.

    Peak memory is a few layers' tensors and one embedding table, whatever the model. Raises FileNotFoundError,
    FileExistsError, `files.InUse` (another process is writing it) or ValueError, in one sentence, and then leaves
    nothing behind.
    """
    target = Path(checkpoint).absolute()
    check_path("target", target)
    check_free(target, options.overwrite, foreign_in_checkpoint)
    source = prepare(open_source(folder, options.reading), options)
    stream = _stream(source, options, None if dtype is None else hf.DTYPES[dtype])
    shapes = param_shapes(source.config)
    dtypes = {path: stream.dtype_of(path) for path in shapes}
    metadata: dict[str, Any] = {"config": {"model": dataclasses.asdict(source.config)}, "generation": source.generation}
    if source.chat_template is not None:
        metadata["chat_template"] = source.chat_template
    begin = time.perf_counter()
    with written_whole(target, options.overwrite, foreign_in_checkpoint) as partial, _Hashes(source, options) as hashes:
        writer = orbax.ParamsWriter(partial, shapes, dtypes, metadata)
        for _ in in_order(lambda part: writer.write(part[0], part[1], stream.read(*part)), source.parts()):
            pass
        if source.tokenizer is not None:
            shutil.copyfile(source.tokenizer, partial / TOKENIZER_NAME)
        if options.verify:
            arrays = orbax.open_arrays(partial)
            _verify(stream, lambda path, layer: orbax.read_part(arrays[path], layer))
        hashed = hashes.finish()
    return _summary(target, stream, hashed, begin, _notes(source))


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
    """Writes a checkpoint of ours (or a PyTorch folder) as a PyTorch folder.

    `dtype` None is that of the source, or of a training run's checkpoint bfloat16, as models are released. `layout`:
    baichuan2 is the released one, with the master rows of the head; baichuan1 has normalised rows, for
    engines without NormHead; llama, for RoPE models, is LlamaForCausalLM's. `change` gives another source in the place
    of the one that was opened, for the dtype that is written. Raises as `to_orbax`.
    """
    target = Path(folder).absolute()
    check_free(target, options.overwrite, foreign_in_export)
    source = prepare(open_source(checkpoint, options.reading), options)
    dtype, notes = (dtype, ()) if dtype is not None else _choose_dtype(source)
    hf_write.check_layout(source.config, layout)
    source = change(source, hf.DTYPES[dtype])
    stream = _stream(source, options, hf.DTYPES[dtype], normalize_head=layout != "baichuan2")
    begin = time.perf_counter()
    with written_whole(target, options.overwrite, foreign_in_export) as partial, _Hashes(source, options) as hashes:
        hf_write.write_folder(stream, partial, dtype, layout, file_format, max_shard_bytes)
        if options.verify:
            tensors = hf.open_folder(partial)
            hf.check_tensors(source.config, tensors, layout)
            _verify(stream, lambda p, i: read_layer(source.config, lambda n: tensors[n].read(), p, i, layout))
        hashed = hashes.finish()
    return _summary(target, stream, hashed, begin, (*notes, *_notes(source)))


def to_gguf(checkpoint: str | Path, file: str | Path, options: Options = Options(), kind: GGUFType = "f16") -> Summary:
    """Writes a model as one GGUF file for llama.cpp. Raises as `to_orbax`."""
    target = Path(file).absolute()
    check_free(target, options.overwrite, foreign_in_gguf)
    source = prepare(open_source(checkpoint, options.reading), options)
    check_gguf(source.config, kind)
    stream = _stream(source, options, np.dtype(np.float32), normalize_head=True)
    begin = time.perf_counter()
    with written_whole(target, options.overwrite, foreign_in_gguf) as partial, _Hashes(source, options) as hashes:
        write_gguf(stream, partial, kind)
        hashed = hashes.finish()
    also = () if source.generation is None else ("generation_config.json",)
    return _summary(target, stream, hashed, begin, _notes(source, also))


def _choose_dtype(source: Source) -> tuple[HFDType, tuple[str, ...]]:
    """The dtype of a PyTorch folder that nobody named, and what is to be said about it."""
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
    """The source with the vocabulary that is asked for; with `open_source`, all that is checked before anything is
    written. Raises ValueError.
    """
    if options.resize_vocab is not None:
        source = resize_vocab(source, options.resize_vocab)
    check_vocabulary(source, options.allow_unused_rows or options.resize_vocab is not None)
    return source


def _stream(source: Source, options: Options, dtype: np.dtype | None, normalize_head: bool = False) -> Stream:
    announce, advance = options.progress
    announce(_size(source))
    return Stream(source, dtype, normalize_head, options.strict, advance)


def _size(source: Source) -> int:
    return sum(
        int(np.prod(shape)) * source.dtypes[path].itemsize for path, shape in param_shapes(source.config).items()
    )


class _Hashes:
    """Checks the source's files against their known hashes while the conversion reads the same files."""

    def __init__(self, source: Source, options: Options) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._files = source.files if options.check_hashes else ()
        self._checked = options.check_hashes and bool(source.files)
        manifested = source.manifested
        self._futures = [self._pool.submit(verify_file, file, manifested.get(file)) for file in self._files]

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def finish(self) -> int | None:
        """How many files had a known hash; raises ValueError if one is wrong. To be called before the result counts."""
        known = [future.result() for future in self._futures]
        return sum(known) if self._checked else None


def _verify(stream: Stream, read: Callable[[str, int | None], np.ndarray]) -> None:
    config = stream.source.config
    parts = [(path, layer) for path in param_shapes(config) for layer in layers_of(config, path)]
    digests = in_order(lambda part: digest_part(part, read(*part)), parts)
    for part, digest in zip(parts, digests, strict=True):
        if digest != stream.digests[part]:
            raise ValueError(
                f"{part[0]} (layer {part[1]}) reads back differently from what was written: the disk is bad."
            )


def _summary(target: Path, stream: Stream, hashed: int | None, begin: float, notes: tuple[str, ...]) -> Summary:
    config = stream.source.config
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    return Summary(
        target, config, len(param_shapes(config)), _size(stream.source), sum(file.stat().st_size for file in files),
        time.perf_counter() - begin, fingerprint(stream.digests.values()), tuple(stream.not_finite), hashed, notes,
    )  # fmt: skip
