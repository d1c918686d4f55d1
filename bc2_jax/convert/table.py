"""The conversion table between parameters and PyTorch tensors, used in both directions.

Each rule maps the axes of a PyTorch tensor to ours, in the shape letters of docs/design.md: D hidden, N heads, H head
size, F ffn, V vocabulary, O one. `Rule.view` shows a PyTorch array in our axes without a copy; reading copies from that
view and writing copies into it, so both directions agree.

Parameters are a nested dict of arrays; a path such as "layers.self_attn.q_proj.weight" names one. Arrays under
"layers." are stacked on a leading axis L; each layer is a PyTorch tensor (or part of one) of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from bc2_jax.config import ModelConfig

_TILE = 128
"""Rows and columns of a block of a transpose: 32 kB in bfloat16."""
Shape = tuple[int, ...]
Part = tuple[str, int | None]
"""(path, layer) of a parameter; layer is None if the array is not stacked."""
Layout = Literal["baichuan2", "baichuan1", "llama", "llama_reward"]
"""baichuan2: as released. baichuan1: same names, head rows normalised. llama: also W_pack split in three. llama_reward:
with a score instead of the head.
"""
Reader = Callable[[str, int | None], np.ndarray]
"""(path, layer) -> that layer of the array; the whole array if layer is None."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter array and the PyTorch tensor that holds it (one per layer if stacked)."""

    path: str
    name: str
    """PyTorch name; {} is the layer."""
    torch: str
    """Axes of the PyTorch tensor; letters in one word are fused into one axis."""
    ours: str
    """Axes of the parameter, without L."""
    part: int = 0
    """Index among the equal parts of the PyTorch tensor's rows."""
    parts: int = 1
    """Number of parameters that share the PyTorch tensor."""

    @property
    def stacked(self) -> bool:
        return is_stacked(self.path)

    def torch_shape(self, config: ModelConfig) -> Shape:
        rows, *columns = (math.prod(_sizes(config, word)) for word in self.torch.split())
        return (self.parts * rows, *columns)

    def shape(self, config: ModelConfig) -> Shape:
        """Shape of the parameter, including L."""
        layers = (config.num_hidden_layers,) if self.stacked else ()
        return layers + _sizes(config, self.ours)

    def view(self, config: ModelConfig, tensor: np.ndarray) -> np.ndarray:
        """One layer of the parameter as a view of the PyTorch tensor; writes go to a contiguous `tensor`."""
        letters = self.torch.replace(" ", "")
        split = tensor.reshape(self.parts, *_sizes(config, letters))
        return split[self.part].transpose([letters.index(letter) for letter in self.ours])


def _sizes(config: ModelConfig, letters: str) -> Shape:
    size = {
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "O": 1,
    }
    return tuple(size[letter] for letter in letters)


def is_stacked(path: str) -> bool:
    """Whether the array at `path` has a leading layer axis."""
    return path.startswith("layers.")


# In the order of the released files. nn.Linear stores [out, in]; we store [in, out].
TABLE = (
    Rule("embed_tokens.weight", "model.embed_tokens.weight", "V D", "VD"),
    # W_pack's rows are all of Q, then K, then V, each ordered by head. It is split because a contiguous shard of the
    # fused tensor would mix the three.
    Rule("layers.self_attn.q_proj.weight", "model.layers.{}.self_attn.W_pack.weight", "NH D", "DNH", 0, 3),
    Rule("layers.self_attn.k_proj.weight", "model.layers.{}.self_attn.W_pack.weight", "NH D", "DNH", 1, 3),
    Rule("layers.self_attn.v_proj.weight", "model.layers.{}.self_attn.W_pack.weight", "NH D", "DNH", 2, 3),
    Rule("layers.self_attn.o_proj.weight", "model.layers.{}.self_attn.o_proj.weight", "D NH", "NHD"),
    Rule("layers.mlp.gate_proj.weight", "model.layers.{}.mlp.gate_proj.weight", "F D", "DF"),
    Rule("layers.mlp.down_proj.weight", "model.layers.{}.mlp.down_proj.weight", "D F", "FD"),
    Rule("layers.mlp.up_proj.weight", "model.layers.{}.mlp.up_proj.weight", "F D", "DF"),
    Rule("layers.input_layernorm.weight", "model.layers.{}.input_layernorm.weight", "D", "D"),
    Rule("layers.post_attention_layernorm.weight", "model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    Rule("norm.weight", "model.norm.weight", "D", "D"),
    Rule("lm_head.weight", "lm_head.weight", "V D", "VD"),
)
# LLaMA's layout differs only in W_pack; its RoPE pairs (i, i + H / 2) as ours does, so no row moves.
_LLAMA_TABLE = tuple(
    Rule(rule.path, f"model.{rule.path.replace('layers.', 'layers.{}.')}", rule.torch, rule.ours)
    if "W_pack" in rule.name
    else rule
    for rule in TABLE
)
_RULES: dict[Layout, tuple[Rule, ...]] = {
    "baichuan2": TABLE,
    "baichuan1": TABLE,
    "llama": _LLAMA_TABLE,
    # LlamaForSequenceClassification with one label.
    "llama_reward": (*_LLAMA_TABLE[:-1], Rule("score.weight", "score.weight", "O D", "OD")),
}
_TABLES = {layout: {rule.path: rule for rule in rules} for layout, rules in _RULES.items()}


class TorchTensor(NamedTuple):
    """One tensor of a PyTorch layout."""

    name: str
    layer: int | None
    rules: tuple[Rule, ...]


def torch_tensors(config: ModelConfig, layout: Layout = "baichuan2") -> list[TorchTensor]:
    """All tensors in the order of the released files: 227 for 7B, 283 for 13B."""
    tensors = []
    for stacked, group in itertools.groupby(_TABLES[layout].values(), lambda rule: rule.stacked):
        by_name: dict[str, list[Rule]] = {}
        for rule in group:
            by_name.setdefault(rule.name, []).append(rule)
        for layer in range(config.num_hidden_layers) if stacked else (None,):
            tensors += [TorchTensor(name.format(layer), layer, tuple(rules)) for name, rules in by_name.items()]
    return tensors


def torch_shapes(config: ModelConfig, layout: Layout = "baichuan2") -> dict[str, Shape]:
    """PyTorch name -> shape, in the order of `torch_tensors`."""
    return {tensor.name: tensor.rules[0].torch_shape(config) for tensor in torch_tensors(config, layout)}


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Path -> shape."""
    return {rule.path: rule.shape(config) for rule in TABLE}


def build_tensor(config: ModelConfig, read: Reader, tensor: TorchTensor) -> tuple[str, np.ndarray]:
    """(PyTorch name, array) of one tensor, from the parameter layers that it holds."""
    array = None
    for rule in tensor.rules:
        part = read(rule.path, tensor.layer)
        if len(tensor.rules) == 1 and rule.torch.replace(" ", "") == rule.ours:  # the same bytes
            return tensor.name, part.reshape(rule.torch_shape(config))
        if array is None:
            array = np.empty(rule.torch_shape(config), part.dtype)
        elif part.dtype != array.dtype:
            raise ValueError(f"The parts of {tensor.name} have different dtypes, {array.dtype} and {part.dtype}.")
        copy_blocks(rule.view(config, array), part)
    assert array is not None
    return tensor.name, array


def read_slice(
    config: ModelConfig,
    get_tensor: Callable[[str], np.ndarray],
    path: str,
    index: tuple[slice, ...] = (),
    layout: Layout = "baichuan2",
    dtype: np.dtype | None = None,
) -> np.ndarray:
    """The part `index` (by default all) of the parameter `path`, in `dtype` or else the dtype of the PyTorch tensors.

    `get_tensor(name)` returns a PyTorch tensor; from a memory map only the bytes of the slice are read. To load
    straight onto a mesh: `jax.make_array_from_callback(shape, sharding, lambda index: read_slice(config, get_tensor,
    path, index))`.
    """
    rule = _TABLES[layout][path]
    shape = rule.shape(config)
    bounds = [s.indices(n) for s, n in zip(index + (slice(None),) * (len(shape) - len(index)), shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"{path}: slices with a step are not supported, got {index}.")
    ranges = [range(*bound) for bound in bounds]
    inner = tuple(slice(r.start, r.stop) for r in (ranges[1:] if rule.stacked else ranges))
    if not rule.stacked:
        return contiguous(cast(rule.view(config, get_tensor(rule.name))[inner], dtype, rule.name))
    out = None
    for i, layer in enumerate(ranges[0]):
        name = rule.name.format(layer)
        part = cast(rule.view(config, get_tensor(name))[inner], dtype, name)
        if out is None:
            out = np.empty([len(r) for r in ranges], part.dtype)
        elif part.dtype != out.dtype:
            raise ValueError(f"{name} is {part.dtype}, the layers before it are {out.dtype}.")
        copy_blocks(out[i], part)
    if out is None:
        raise ValueError(f"{path}: the slice {index} holds no layer.")
    return out


def cast(array: np.ndarray, dtype: np.dtype | None, name: str) -> np.ndarray:
    """The array in `dtype` (None: its own); raises ValueError if a finite value overflows."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if np.dtype(dtype).itemsize < array.dtype.itemsize and not np.array_equal(np.isfinite(out), np.isfinite(array)):
        raise ValueError(f"{name} overflows in {np.dtype(dtype).name}: it has values up to {np.abs(array).max():.6g}.")
    return out


def contiguous(array: np.ndarray) -> np.ndarray:
    """A copy in C order."""
    out = np.empty(array.shape, array.dtype)
    copy_blocks(out, array)
    return out


def copy_blocks(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, of one dtype; a transpose goes through a small buffer, which is three times as fast."""
    if target.dtype.kind == "V":  # numpy copies bfloat16 element by element, and integers in bulk
        target, source = target.view(np.uint16), source.view(np.uint16)
    if target.ndim == 3:  # one transpose per head
        axis = int(np.argmin(target.shape))
        for part, other in zip(np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0), strict=True):
            copy_blocks(part, other)
    elif target.ndim == 2 and _is_wide(target) != _is_wide(source):
        if not _is_wide(target):
            target, source = target.T, source.T
        # Rows of a tensor are a power of two apart in memory, so those of a block would evict each other from the
        # cache while it is read across. In the buffer they lie side by side.
        buffer = np.empty((_TILE, _TILE), target.dtype)
        for i in range(0, target.shape[0], _TILE):
            for j in range(0, target.shape[1], _TILE):
                block = source[i : i + _TILE, j : j + _TILE].T
                tile = buffer[: block.shape[0], : block.shape[1]]
                tile[...] = block
                target[i : i + _TILE, j : j + _TILE] = tile.T
    else:
        target[...] = source


def _is_wide(matrix: np.ndarray) -> bool:
    """Whether the elements of a row lie closer together in memory than those of a column."""
    return matrix.strides[1] <= matrix.strides[0]


def read_layer(
    config: ModelConfig, get_tensor: Callable[[str], np.ndarray], path: str, layer: int | None,
    layout: Layout = "baichuan2", dtype: np.dtype | None = None,
) -> np.ndarray:  # fmt: skip
    """One layer of a parameter (all of it if layer is None) in C order, in `dtype` or else the tensor's dtype.

    It is a view of the tensor if possible.
    """
    rule = _TABLES[layout][path]
    name = rule.name.format(layer)
    view = cast(rule.view(config, get_tensor(name)), dtype, name)
    return view if view.flags.c_contiguous else contiguous(view)


def torch_name(path: str, layer: int = 0, layout: Layout = "baichuan2") -> str:
    """The PyTorch tensor that holds a parameter (or that layer of it)."""
    return _TABLES[layout][path].name.format(layer)


def parts_of(shapes: Mapping[str, Shape]) -> list[Part]:
    """Every part of arrays of these shapes, by which they are read and written; sorted by path."""
    return [(path, i) for path in sorted(shapes) for i in (range(shapes[path][0]) if is_stacked(path) else (None,))]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a.b": x}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
