"""What is in a model on disk, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import re
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

    name: str
    """With {} in the place of the layer."""
    count: int
    shape: Shape
    dtype: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    path: Path
    format: str
    model: str
    """Which known model it is."""
    why: tuple[str, ...]
    """How the position scheme and the kind of head were told."""
    config: ModelConfig
    groups: tuple[TensorGroup, ...]
    parameters: int
    bytes: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    head_norms: tuple[float, float, float] | None
    """Smallest, mean and largest length of the head's rows; None where the head cannot be read."""
    refusal: str | None
    """The sentence with which a conversion would refuse it, before it writes anything."""
    left_out: tuple[str, ...]
    """Names of files that a conversion would not carry over."""

    @property
    def is_consistent(self) -> bool:
        return self.refusal is None

    @property
    def head(self) -> str:
        if self.head_norms is None:
            return "not there"
        low, mean, high = self.head_norms
        kind = "normalised" if are_unit(np.array(self.head_norms)) else "master"
        return f"{kind} rows, of length {low:.4f} to {high:.4f}, {mean:.4f} on average"


def inspect(path: str | Path, options: Options = DEFAULTS) -> Inspection:
    """Everything that can be told without reading more than metadata and the head.

    What a conversion with these options would check before it writes is checked too; its verdict is in the result, with
    what is missing, unexpected or misshapen. Raises FileNotFoundError or ValueError, as a conversion would, for what
    cannot be opened at all.
    """
    model = find_model(path, options.reading)
    path, config = model.path, model.config
    contents = open_contents(model, options.reading)
    params: dict[str, Any] = contents
    rows = None
    if model.format == "pytorch":
        choices = choose(read_json(path / "config.json"), options.reading)
        why = tuple(f"{name} = {choice.value}, because {choice.why}" for name, choice in choices.items())
        params, _ = hf.split_buffers(contents)
        layout = hf.find_layout(params)
        expected = torch_shapes(config, layout)
        form = f"PyTorch, {'safetensors' if _has_safetensors(params) else '.bin'}"
        form += ", LLaMA's layout" * (layout == "llama")
        if _is_table(params.get(HEAD)):
            rows = params[HEAD].read()
    else:
        why = (f"position_embedding = {config.position_embedding}, because the checkpoint's config says so",)
        expected = param_shapes(config)
        form = f"Orbax, {'training' if (path / 'opt_state').is_dir() else 'parameters only'}"
        if _is_table(params.get(HEAD)):
            rows = orbax.read_part(params[HEAD], None)
    found = {name: (tuple(array.shape), array.dtype.name) for name, array in params.items()}
    refusal: str | None = None
    left_out: tuple[str, ...] = ()
    try:
        left_out = prepare(make_source(model, contents, options.reading), options).unread
    except (OSError, ValueError) as error:
        refusal = str(error)
    groups: dict[tuple[str, Shape, str], int] = {}
    for name, (shape, dtype) in found.items():
        key = re.sub(r"\.\d+\.", ".{}.", name), shape, dtype
        groups[key] = groups.get(key, 0) + 1
    return Inspection(
        path=path,
        format=form,
        model=_name_model(config),
        why=why,
        config=config,
        groups=tuple(TensorGroup(name, count, shape, dtype) for (name, shape, dtype), count in groups.items()),
        parameters=sum(int(np.prod(shape)) for shape, _ in found.values()),
        bytes=sum(int(np.prod(shape)) * np.dtype(_numpy_name(dtype)).itemsize for shape, dtype in found.values()),
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        misshapen=tuple(
            f"{name} {found[name][0]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and found[name][0] != shape
        ),
        head_norms=None if rows is None else _summarise(row_lengths(row_blocks(rows))),
        refusal=refusal,
        left_out=left_out,
    )


def _is_table(array: Any) -> bool:
    """Whether it is one whose rows can be measured."""
    return array is not None and len(array.shape) == 2 and all(array.shape)


def _has_safetensors(tensors: dict) -> bool:
    return any(tensor.file.suffix == ".safetensors" for tensor in tensors.values())


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _name_model(config: ModelConfig) -> str:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "position_embedding")
    for name, known in (("7B", BAICHUAN2_7B), ("13B", BAICHUAN2_13B)):
        if all(getattr(config, size) == getattr(known, size) for size in sizes):
            return f"Baichuan {2 if config.normalize_head else 1} {name}"
    return f"of the kind of Baichuan {2 if config.normalize_head else 1}"


def _summarise(lengths: np.ndarray) -> tuple[float, float, float]:
    return float(lengths.min()), float(lengths.mean(dtype=np.float64)), float(lengths.max())


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """How one array of ours differs between two models; the largest values over its layers."""

    path: str
    layers: tuple[int | None, ...]
    """Where it differs."""
    max_abs: float
    max_rel: float
    """Largest difference over the largest absolute value of the array in A."""
    dtypes: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `diff` found."""

    fields: tuple[str, ...]
    """Fields of the config that differ."""
    arrays: tuple[ArrayDifference, ...]
    """Those that are not equal bit for bit, in dtype and value."""
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
    if param_shapes(left.config) != param_shapes(right.config):
        raise ValueError(f"{a} and {b} are models of different shapes ({'; '.join(fields)}).")

    parts = list(left.parts())
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
    """(equal bit for bit, largest absolute difference, largest absolute value in `left`); NaN differs from NaN by 0."""
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
