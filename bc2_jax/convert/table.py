"""The one table between our parameters and the PyTorch names, used in both directions.

Each rule says how the axes of a PyTorch tensor become ours, in the shape letters of docs/design.md: D hidden, N heads,
H head size, F ffn, V vocabulary. `Rule.view` shows a PyTorch array in our axes without copying it; reading copies out
of that view and writing copies into it, so the two directions cannot disagree.

Ours is a nested dict of arrays; a path such as "layers.self_attn.q_proj.weight" names one of them. Paths that start
with "layers." are stacked on a leading axis L; each layer is a PyTorch tensor (or a part of one) of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bc2_jax.config import ModelConfig

Shape = tuple[int, ...]


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
_BY_PATH = {rule.path: rule for rule in TABLE}


def _torch_tensors(config: ModelConfig) -> Iterator[tuple[str, int | None, list[Rule]]]:
    """(PyTorch name, layer, the rules that share the tensor), in the order of the released files."""
    first = next(i for i, rule in enumerate(TABLE) if rule.stacked)
    last = max(i for i, rule in enumerate(TABLE) if rule.stacked) + 1
    groups: list[tuple[int | None, tuple[Rule, ...]]] = [(None, TABLE[:first])]
    groups += [(layer, TABLE[first:last]) for layer in range(config.num_hidden_layers)]
    groups += [(None, TABLE[last:])]
    for layer, rules in groups:
        by_name: dict[str, list[Rule]] = {}
        for rule in rules:
            by_name.setdefault(rule.name.format(layer), []).append(rule)
        for name, shared in by_name.items():
            yield name, layer, shared


def torch_shapes(config: ModelConfig) -> dict[str, Shape]:
    """PyTorch name -> shape, in the order of the released files: 227 tensors for 7B, 283 for 13B."""
    return {name: rules[0].torch_shape(config) for name, _, rules in _torch_tensors(config)}


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our path -> shape."""
    return {rule.path: rule.shape(config) for rule in TABLE}


def to_torch(
    config: ModelConfig, get_array: Callable[[str, int | None], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Streams the PyTorch tensors, one in memory at a time, in the order of `torch_shapes`.

    `get_array(path, layer)` gives one layer of one of our arrays (all of it where layer is None).
    """
    for name, layer, rules in _torch_tensors(config):
        tensor = None
        for rule in rules:
            array = get_array(rule.path, layer)
            if tensor is None:
                tensor = np.empty(rule.torch_shape(config), array.dtype)
            elif array.dtype != tensor.dtype:
                raise ValueError(f"The parts of {name} have different dtypes, {tensor.dtype} and {array.dtype}.")
            rule.view(config, tensor)[...] = array
        assert tensor is not None
        yield name, tensor


def read_slice(
    config: ModelConfig,
    get_tensor: Callable[[str], np.ndarray],
    path: str,
    index: tuple[slice, ...] = (),
) -> np.ndarray:
    """The part `index` of our array `path` (all of it by default), in the dtype of the PyTorch tensors.

    `get_tensor(name)` gives a PyTorch tensor; if that is a memory map, only the bytes of the slice are read. It serves
    as a callback that puts an array straight onto a mesh:
    `jax.make_array_from_callback(shape, sharding, lambda index: read_slice(config, get_tensor, path, index))`.
    """
    rule = _BY_PATH[path]
    shape = rule.shape(config)
    bounds = [s.indices(n) for s, n in zip(index + (slice(None),) * (len(shape) - len(index)), shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"{path}: slices with a step are not supported, got {index}.")
    ranges = [range(*bound) for bound in bounds]
    inner = tuple(slice(r.start, r.stop) for r in (ranges[1:] if rule.stacked else ranges))
    if not rule.stacked:
        return rule.view(config, get_tensor(rule.name))[inner].copy(order="C")
    out = None
    for i, layer in enumerate(ranges[0]):
        tensor = get_tensor(rule.name.format(layer))
        if out is None:
            out = np.empty([len(r) for r in ranges], tensor.dtype)
        elif tensor.dtype != out.dtype:
            raise ValueError(f"{rule.name.format(layer)} is {tensor.dtype}, the layers before it are {out.dtype}.")
        out[i] = rule.view(config, tensor)[inner]
    if out is None:
        raise ValueError(f"{path}: the slice {index} holds no layer.")
    return out


def from_torch(config: ModelConfig, get_tensor: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Our nested dict of numpy arrays, in the dtype of the PyTorch tensors."""
    return unflatten({rule.path: read_slice(config, get_tensor, rule.path) for rule in TABLE})


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
