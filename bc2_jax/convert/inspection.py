"""Inspects a model on disk (`inspect`) and compares two of them (`diff`)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig, differing_fields
from bc2_jax.convert import hf, orbax
from bc2_jax.convert.conversion import Options, prepare
from bc2_jax.convert.hf_config import choose, read_json
from bc2_jax.convert.pretrained import find_model
from bc2_jax.convert.source import Source, make_source, open_contents, open_source
from bc2_jax.convert.stream import HEAD, in_order, row_blocks
from bc2_jax.convert.table import Shape, param_shapes, torch_shapes
from bc2_jax.convert.weights import are_unit, row_lengths

DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in their layer."""

    name: str  # with {} for the layer
    count: int
    shape: Shape
    dtype: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Result of `inspect`."""

    path: Path
    format: str
    model: str  # the known model of this size
    why: tuple[str, ...]  # how the position scheme and the kind of head were determined
    config: ModelConfig
    groups: tuple[TensorGroup, ...]
    parameters: int
    bytes: int
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    head_norms: tuple[float, float, float] | None
    """Smallest, mean and largest length of the head's rows; None if the head cannot be read."""
    refusal: str | None  # the error with which a conversion would refuse it before writing anything
    left_out: tuple[str, ...]  # files that a conversion would leave out

    @property
    def is_consistent(self) -> bool:
        return self.refusal is None

    @property
    def head(self) -> str:
        if self.head_norms is None:
            return "missing"
        low, mean, high = self.head_norms
        kind = "normalised" if are_unit(np.array(self.head_norms)) else "master"
        return f"{kind} rows, of length {low:.4f} to {high:.4f}, {mean:.4f} on average"


def inspect(path: str | Path, options: Options = DEFAULTS) -> Inspection:
    """Reports on a model, reading only metadata and the head.

    Makes the checks of a conversion with these options; the result has its error, and missing, unexpected and misshapen
    tensors. Raises FileNotFoundError or ValueError, as a conversion, for a model that cannot be opened.
    """
    model = find_model(path, options.reading)
    path, config = model.path, model.config
    params: dict[str, Any] = open_contents(model, options.reading)
    refusal: str | None = None
    left_out: tuple[str, ...] = ()
    try:
        left_out = prepare(make_source(model, params, options.reading), options).unread
    except (OSError, ValueError) as error:
        refusal = str(error)
    if model.format == "pytorch":
        choices = choose(read_json(path / "config.json"), options.reading)
        why = tuple(f"{name} = {choice.value}, because {choice.why}" for name, choice in choices.items())
        params, _ = hf.split_buffers(params)
        layout = hf.find_layout(params)
        expected = torch_shapes(config, layout)
        is_safetensors = any(tensor.file.suffix == ".safetensors" for tensor in params.values())
        form = f"PyTorch, {'safetensors' if is_safetensors else '.bin'}" + ", LLaMA's layout" * (layout == "llama")
    else:
        why = (f"position_embedding = {config.position_embedding}, because the checkpoint's config says so",)
        expected = param_shapes(config)
        form = f"Orbax, {'training' if (path / 'opt_state').is_dir() else 'parameters only'}"
    head, norms = params.get(HEAD), None
    if head is not None and len(head.shape) == 2 and all(head.shape):
        rows = head.read() if model.format == "pytorch" else orbax.read_part(head, None)
        lengths = row_lengths(row_blocks(rows))
        norms = (float(lengths.min()), float(lengths.mean(dtype=np.float64)), float(lengths.max()))
    shapes = {name: tuple(array.shape) for name, array in params.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    groups = Counter((re.sub(r"\.\d+\.", ".{}.", n), shapes[n], array.dtype.name) for n, array in params.items())
    missing, unexpected, misshapen = hf.compare_shapes(expected, shapes)
    return Inspection(
        path=path,
        format=form,
        model=_name_model(config),
        why=why,
        config=config,
        groups=tuple(TensorGroup(name, count, shape, dtype) for (name, shape, dtype), count in groups.items()),
        parameters=sum(sizes.values()),
        bytes=sum(sizes[name] * _itemsize(array.dtype.name) for name, array in params.items()),
        missing=missing,
        unexpected=unexpected,
        misshapen=misshapen,
        head_norms=norms,
        refusal=refusal,
        left_out=left_out,
    )


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _name_model(config: ModelConfig) -> str:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "position_embedding")
    for name, known in (("7B", BAICHUAN2_7B), ("13B", BAICHUAN2_13B)):
        if all(getattr(config, size) == getattr(known, size) for size in sizes):
            return f"Baichuan {2 if config.normalize_head else 1} {name}"
    return f"of the kind of Baichuan {2 if config.normalize_head else 1}"


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """Difference of one parameter array between two models; maxima over its layers."""

    path: str
    layers: tuple[int | None, ...]
    max_abs: float
    max_rel: float  # largest difference divided by the largest absolute value of the array in A
    dtypes: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of `diff`."""

    fields: tuple[str, ...]
    arrays: tuple[ArrayDifference, ...]  # arrays that differ in dtype or in any bit
    total: int

    @property
    def is_same(self) -> bool:
        return not self.fields and not self.arrays


def diff(a: str | Path, b: str | Path, advance: Callable[[int], None] = lambda _: None) -> Comparison:
    """Compares two models, in either format, part by part.

    Raises FileNotFoundError or ValueError if one cannot be opened or their shapes differ.
    """
    left, right = open_source(a), open_source(b)
    fields = tuple(differing_fields(left.config, right.config))
    if left.shapes != right.shapes:
        raise ValueError(f"{a} and {b} are models of different shapes ({'; '.join(fields)}).")
    parts = left.parts()
    differences: dict[str, list[tuple[int | None, float, float]]] = {}
    compared = in_order(lambda part: _compare_part(left, right, part[0], part[1], advance), parts)
    for (path, layer), (same, max_abs, largest) in zip(parts, compared, strict=True):
        if not same:
            differences.setdefault(path, []).append((layer, max_abs, max_abs / largest if largest else np.inf))
    arrays = tuple(
        ArrayDifference(
            path, tuple(layer for layer, _, _ in found), max(d for _, d, _ in found), max(r for _, _, r in found),
            (left.dtypes[path].name, right.dtypes[path].name),
        )
        for path, found in differences.items()
    )  # fmt: skip
    return Comparison(fields, arrays, len(left.dtypes))


def _compare_part(
    left: Source, right: Source, path: str, layer: int | None, advance: Callable[[int], None]
) -> tuple[bool, float, float]:
    """(bitwise equal, largest absolute difference, largest absolute value in `left`); NaN equals NaN."""
    a, b = left.read(path, layer), right.read(path, layer)
    advance(a.nbytes)
    if a.dtype == b.dtype and all(
        np.array_equal(_bits(x), _bits(y)) for x, y in zip(row_blocks(a), row_blocks(a, b), strict=True)
    ):
        return True, 0.0, 0.0
    max_abs = largest = 0.0
    for x, y in zip(row_blocks(a), row_blocks(a, b), strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        both_nan = np.isnan(x) & np.isnan(y)
        distance = np.where(both_nan, 0.0, np.abs(x - y))
        distance[np.isnan(distance)] = np.inf
        max_abs, largest = max(max_abs, float(distance.max())), max(largest, float(np.nan_to_num(np.abs(x)).max()))
    return False, max_abs, largest


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
