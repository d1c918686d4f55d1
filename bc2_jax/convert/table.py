"""The one table between our parameters and the PyTorch names, used in both directions.

Each rule says how the axes of a PyTorch tensor become ours, in the shape letters of docs/design.md: D hidden, N heads,
H head size, F ffn, V vocabulary, O one. `Rule.view` shows a PyTorch array in our axes without copying it; reading
copies out of that view and writing copies into it, so the two directions cannot disagree.

Ours is a nested dict of arrays; a path such as "layers.self_attn.q_proj.weight" names one of them. Paths that start
with "layers." are stacked on a leading axis L; each layer is a PyTorch tensor (or a part of one) of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from bc2_jax.config import ModelConfig

Shape = tuple[int, ...]
Layout = Literal["baichuan2", "baichuan1", "llama", "llama_reward"]
"""baichuan2: as released. baichuan1: the same names, rows of the head normalised. llama: also W_pack in three parts.
llama_reward: with a score in place of the head."""
LAYOUTS: tuple[Layout, ...] = ("baichuan2", "baichuan1", "llama")
"""Of language models."""


Reader = Callable[[str, int | None], np.ndarray]
"""(our path, layer) -> that layer of our array; all of it where layer is None."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our arrays and the PyTorch tensor that holds it (one a layer, if it is stacked)."""

    path: str
    """Our path."""
    name: str
    """The PyTorch name; {} is the layer."""
    torch: str
    """Axes of the PyTorch tensor; letters in one word are fused into one axis."""
    ours: str
    """Axes of our array, without L."""
    part: int = 0
    """Which of the equal parts of the PyTorch tensor's rows is ours."""
    parts: int = 1
    """How many of our arrays share the PyTorch tensor."""

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers.")

    def torch_shape(self, config: ModelConfig) -> Shape:
        rows, *columns = (math.prod(_sizes(config, word)) for word in self.torch.split())
        return (self.parts * rows, *columns)

    def shape(self, config: ModelConfig) -> Shape:
        """Shape of our array, L included."""
        layers = (config.num_hidden_layers,) if self.stacked else ()
        return layers + _sizes(config, self.ours)

    def view(self, config: ModelConfig, tensor: np.ndarray) -> np.ndarray:
        """One layer of our array as a view of the PyTorch tensor; a write to it writes to a contiguous `tensor`."""
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


# In the order of the released files. nn.Linear keeps [out, in]; we keep [in, out].
TABLE = (
    Rule("embed_tokens.weight", "model.embed_tokens.weight", "V D", "VD"),
    # W_pack's rows are all of Q, then all of K, then all of V; inside each the heads follow one another. It is split
    # because a contiguous shard of the fused tensor would mix the three.
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
# LLaMA's modelling code differs in this alone; its RoPE pairs (i, i + H / 2) as ours does, so no row moves.
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
    """Those that share it."""


def torch_tensors(config: ModelConfig, layout: Layout = "baichuan2") -> list[TorchTensor]:
    """Every tensor, in the order of the released files: 227 for 7B, 283 for 13B."""
    rules = tuple(_TABLES[layout].values())
    first = next(i for i, rule in enumerate(rules) if rule.stacked)
    last = max(i for i, rule in enumerate(rules) if rule.stacked) + 1
    groups: list[tuple[int | None, tuple[Rule, ...]]] = [(None, rules[:first])]
    groups += [(layer, rules[first:last]) for layer in range(config.num_hidden_layers)]
    groups += [(None, rules[last:])]
    tensors = []
    for layer, group in groups:
        by_name: dict[str, list[Rule]] = {}
        for rule in group:
            by_name.setdefault(rule.name.format(layer), []).append(rule)
        tensors += [TorchTensor(name, layer, tuple(shared)) for name, shared in by_name.items()]
    return tensors


def torch_shapes(config: ModelConfig, layout: Layout = "baichuan2") -> dict[str, Shape]:
    """PyTorch name -> shape, in the order of `torch_tensors`."""
    return {tensor.name: tensor.rules[0].torch_shape(config) for tensor in torch_tensors(config, layout)}


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our path -> shape."""
    return {rule.path: rule.shape(config) for rule in TABLE}


def build_tensor(config: ModelConfig, read: Reader, tensor: TorchTensor) -> tuple[str, np.ndarray]:
    """(PyTorch name, array) of one tensor, made of the layers of our arrays that it holds."""
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


def to_torch(config: ModelConfig, read: Reader, layout: Layout = "baichuan2") -> Iterator[tuple[str, np.ndarray]]:
    """Streams the PyTorch tensors, one in memory at a time, in the order of `torch_tensors`."""
    return (build_tensor(config, read, tensor) for tensor in torch_tensors(config, layout))


def read_slice(
    config: ModelConfig,
    get_tensor: Callable[[str], np.ndarray],
    path: str,
    index: tuple[slice, ...] = (),
    layout: Layout = "baichuan2",
    dtype: np.dtype | None = None,
) -> np.ndarray:
    """The part `index` of our array `path` (all of it by default), in `dtype` or else in that of the PyTorch tensors.

    `get_tensor(name)` gives a PyTorch tensor; if that is a memory map, only the bytes of the slice are read. It serves
    as a callback that puts an array straight onto a mesh:
    `jax.make_array_from_callback(shape, sharding, lambda index: read_slice(config, get_tensor, path, index))`.
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
    """The array in `dtype`, itself if that is its own or None; raises ValueError if a finite value overflows."""
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
    """target[...] = source, of one dtype, in blocks that stay in the cache: thrice as fast for a transpose."""
    if target.dtype.kind == "V":  # bfloat16, which is copied element by element by a function; integers are not
        target, source = target.view(np.uint16), source.view(np.uint16)
    if target.ndim == 2 and not (target.flags.c_contiguous and source.flags.c_contiguous):
        for i in range(0, target.shape[0], 64):
            for j in range(0, target.shape[1], 64):
                target[i : i + 64, j : j + 64] = source[i : i + 64, j : j + 64]
    elif target.ndim == 3:  # heads: one transpose each
        axis = int(np.argmin(target.shape))
        for part, other in zip(np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0), strict=True):
            copy_blocks(part, other)
    else:
        target[...] = source


def read_layer(
    config: ModelConfig, get_tensor: Callable[[str], np.ndarray], path: str, layer: int | None,
    layout: Layout = "baichuan2", dtype: np.dtype | None = None,
) -> np.ndarray:  # fmt: skip
    """One layer of our array (all of it where layer is None) in C order, in `dtype` or else in that of the tensor.

    A view of the tensor where it can be.
    """
    rule = _TABLES[layout][path]
    name = rule.name.format(layer)
    view = cast(rule.view(config, get_tensor(name)), dtype, name)
    return view if view.flags.c_contiguous else contiguous(view)


def torch_name(path: str, layer: int = 0, layout: Layout = "baichuan2") -> str:
    """The PyTorch tensor that holds (that layer of) our array."""
    return _TABLES[layout][path].name.format(layer)


def layers_of(config: ModelConfig, path: str) -> range | tuple[None]:
    """The layers by which our array is read: all of them, or None where it is not stacked."""
    return range(config.num_hidden_layers) if path.startswith("layers.") else (None,)


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
