"""LoRA (arXiv 2106.09685): low-rank adapters beside the weights of a model, with rsLoRA and DoRA.

An adapter is a separate tree of fp32 arrays: `lora_a` [L, in, r] and `lora_b` [L, r, out] for each target, where in and
out are the dimensions of the weight (D; N, H; F), and with DoRA `magnitude` [L, out]. W_pack is q_proj, k_proj and
v_proj with a common `lora_a`; its out is 3, N, H.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig, LoraTarget
from bc2_jax.model.baichuan import Backbone, Params
from bc2_jax.model.equations import ACTIVATION_AXES, EQUATIONS, WEIGHT_AXES, Dimensions, split_equation
from bc2_jax.model.layers import Linear, linear
from bc2_jax.sharding import named_sharding, reshard, spec, use_mesh_of


class Adapter(NamedTuple):
    """Trained adapters and their config."""

    config: LoraConfig
    params: Params
    """{"layers": {"self_attn": {"q_proj": {"lora_a", "lora_b", "magnitude"}, ...}, "mlp": {...}}}, fp32."""


class Slot(NamedTuple):
    """The place of a target's adapter."""

    block: str
    """Module of the layer that holds the weights."""
    weights: tuple[str, ...]
    """The weights; several are rows of one released matrix."""


_QKV = ("q_proj", "k_proj", "v_proj")
SLOTS: dict[LoraTarget, Slot] = {
    target: Slot("mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn",
                 _QKV if target == "W_pack" else (target,))
    for target in LORA_TARGETS
}  # fmt: skip


Model = TypeVar("Model", bound=Backbone)


def equation_of(target: LoraTarget) -> str:
    """The matmul equation of a target's weights, as stored."""
    return EQUATIONS[SLOTS[target].weights[0]]


class DropoutKey(nnx.Variable):
    """Random bits of each layer, uint32 [L, ...] as from `jax.random.key_data`."""


class LoraLinear(Linear):
    """y = W x + scaling * B A x; with DoRA (arXiv 2402.09353) the rows of W + scaling * B A have trained lengths.

    W and A, B are multiplied one after the other: adding B A to W would need the gradient of W in the backward pass. As
    in PEFT, the lengths of the rows before scaling count as constants.
    """

    def __init__(
        self, base: Linear, lora_a: Linear, lora_b: Linear, scaling: float, magnitude: Array | None = None,
        dropout: float = 0.0, keys: Array | None = None,
    ):  # fmt: skip
        """`lora_a` and `lora_b` are modules, so that weights can share one; with `keys` [L] there is dropout."""
        super().__init__(base.equation, base.weight[...], base.name)
        self.lora_a, self.lora_b, self.scaling, self.dropout = lora_a, lora_b, scaling, dropout
        self.use_dora, self.use_dropout = magnitude is not None, False
        if magnitude is not None:
            out = Dimensions.of(base.equation).out
            self.magnitude = nnx.Param(magnitude, axes=("layers", *(WEIGHT_AXES[letter] for letter in out)))
            self.is_row_scale = False  # `magnitude` is what is trained
        if keys is not None and dropout > 0:
            self.use_dropout, self.key_impl = True, jax.random.key_impl(keys)
            self.dropout_key = DropoutKey(jax.random.key_data(keys))

    def __call__(self, x: Array) -> Array:
        w, kept = self.weight[...], self._drop(x) if self.use_dropout else x
        y = linear(self.equation, x, w, self.name)
        change = self.lora_b(self.lora_a(kept) * self.scaling)
        if not self.use_dora:
            return y + change
        scale = reshard(self._row_scale(), *(ACTIVATION_AXES[letter] for letter in Dimensions.of(self.equation).out))
        if not self.use_dropout:
            return ((y + change).astype(jnp.float32) * scale).astype(x.dtype)
        dropped = linear(self.equation, kept, w).astype(jnp.float32)
        return (y + (scale - 1) * dropped + scale * change).astype(x.dtype)

    def _drop(self, x: Array) -> Array:
        """`x` with dropout; the dropped values do not depend on the mesh."""
        key = jax.random.wrap_key_data(self.dropout_key[...], impl=self.key_impl)
        sharding = named_sharding(*(ACTIVATION_AXES[letter] for letter in Dimensions.of(self.equation).x))
        is_kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape, out_sharding=sharding)
        return jnp.where(is_kept, x / (1 - self.dropout), 0).astype(x.dtype)

    def _row_scale(self) -> Array:
        """The fp32 factor of each row of W + scaling * B A; [L, out] for stacked weights."""
        if self.is_row_scale:
            return self.magnitude[...]
        w, a, b = (x.weight[...].astype(jnp.float32) for x in (self, self.lora_a, self.lora_b))
        return self.magnitude[...] / jax.lax.stop_gradient(_row_norm(self.equation, w, a, b, self.scaling))

    def fix_row_scale(self) -> None:
        """Computes the row factors once, for calls with constant weights."""
        if self.use_dora:
            self.magnitude, self.is_row_scale = nnx.Param(self._row_scale(), axes=self.magnitude.axes), True


def _row_norm(equation: str, w: Any, a: Any, b: Any, scaling: float) -> Any:
    """Length of each row of W + scaling * B A; for one layer or stacked, numpy or jax."""
    return _length_of_rows(equation, _changed(equation, w, a, b, scaling))


def _length_of_rows(equation: str, w: Any) -> Any:
    x, w_dims, _ = split_equation(equation)
    summed = tuple(i - len(w_dims) for i, letter in enumerate(w_dims) if letter in x)
    return (w * w).sum(axis=summed) ** 0.5


def _changed(equation: str, w: Any, a: Any, b: Any, scaling: float) -> Any:
    """W + scaling * B A in the layout of W."""
    dims, letters = Dimensions.of(equation), split_equation(equation)[1]
    einsum = functools.partial(np.einsum, optimize=True) if isinstance(w, np.ndarray) else jnp.einsum
    return w + scaling * einsum(f"...{dims.into}R,...R{dims.out}->...{letters}", a, b)


def with_adapter(model: Model, config: LoraConfig, params: Params, dropout_key: Array | None = None) -> Model:
    """`model` with an adapter beside its weights, sharing all arrays.

    With a key, a share of config.dropout of the adapter's inputs is zero, different for each key and independent of the
    mesh. Differentiable with respect to `params`.
    """
    model = nnx.merge(*nnx.split(model))  # new modules around the same arrays
    params = jax.tree.map(jnp.asarray, params)
    for target in config.targets:
        slot = SLOTS[target]
        block, arrays = getattr(model.layers, slot.block), params["layers"][slot.block][target]
        bases = [getattr(block, name) for name in slot.weights]
        if any(isinstance(base, LoraLinear) for base in bases):
            raise ValueError(f"The model has an adapter on {target} already: merge it into the weights first.")
        keys = None
        if dropout_key is not None:
            own = jax.random.fold_in(dropout_key, LORA_TARGETS.index(target))
            keys = jax.random.split(own, model.config.num_hidden_layers)
        dims = Dimensions.of(bases[0].equation)
        lora_a = Linear(dims.equation_a, arrays["lora_a"])
        for name, base in zip(slot.weights, bases, strict=True):
            part = part_of(arrays, target, name)
            lora_b, magnitude = Linear(dims.equation_b, part["lora_b"]), part.get("magnitude")
            module = LoraLinear(base, lora_a, lora_b, config.scaling_of(target), magnitude, config.dropout, keys)
            setattr(block, name, module)
    return model


def part_of(arrays: dict[str, Any], target: LoraTarget, name: str) -> dict[str, Any]:
    """A target's arrays for its weight `name`: for W_pack, A and a third of the others."""
    weights = SLOTS[target].weights
    if len(weights) == 1:
        return arrays
    i = weights.index(name)
    lora_b, others = arrays["lora_b"][:, :, i], {k: v[:, i] for k, v in arrays.items() if k == "magnitude"}
    return {"lora_a": arrays["lora_a"], "lora_b": lora_b, **others}


class _Array(NamedTuple):
    """Shape and logical axes of one array of an adapter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def _arrays(config: LoraConfig, model_config: ModelConfig) -> dict[LoraTarget, dict[str, _Array]]:
    size = {
        "D": model_config.hidden_size, "N": model_config.num_attention_heads, "H": model_config.head_dim,
        "F": model_config.intermediate_size,
    }  # fmt: skip
    arrays = {}
    for target in config.targets:
        dims, rank, L = Dimensions.of(equation_of(target)), config.rank_of(target), model_config.num_hidden_layers
        into, out = (tuple(size[c] for c in letters) for letters in (dims.into, dims.out))
        axes_in, axes_out = (tuple(WEIGHT_AXES[c] for c in letters) for letters in (dims.into, dims.out))
        if len(SLOTS[target].weights) > 1:
            out, axes_out = (len(SLOTS[target].weights), *out), (None, *axes_out)
        arrays[target] = {
            "lora_a": _Array((L, *into, rank), ("layers", *axes_in, None)),
            "lora_b": _Array((L, rank, *out), ("layers", None, *axes_out)),
        }
        if config.dora:
            arrays[target]["magnitude"] = _Array((L, *out), ("layers", *axes_out))
    return arrays


def _tree(by_target: dict[LoraTarget, dict[str, Any]]) -> Params:
    layers: Params = {}
    for target, arrays in by_target.items():
        layers.setdefault(SLOTS[target].block, {})[target] = arrays
    return {"layers": layers}


def abstract_adapter(config: LoraConfig, model_config: ModelConfig, mesh: Mesh | None) -> Params:
    """ShapeDtypeStructs of an adapter's fp32 arrays, sharded like their weights on `mesh`, or on one device."""

    def place(array: _Array) -> jax.ShapeDtypeStruct:
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        sharding = one_device if mesh is None else NamedSharding(mesh, spec(*array.axes))
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)

    by_target = _arrays(config, model_config)
    return _tree({t: {name: place(array) for name, array in arrays.items()} for t, arrays in by_target.items()})


def init_adapter(
    config: LoraConfig, model_config: ModelConfig, base_params: Params, seed: int, mesh: Mesh | None
) -> Params:
    """An adapter that does not change the model yet, each array made in shards on its devices.

    A: U(+-1 / sqrt(inputs)), B: 0, DoRA's magnitudes: row lengths of `base_params`, of any dtype. The values do not
    depend on the mesh, and those of a target not on the other targets.
    """
    bases = {t: {name: base_params["layers"][SLOTS[t].block][name]["weight"] for name in SLOTS[t].weights}
             for t in config.targets if config.dora}  # fmt: skip
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapter(config, model_config, mesh))

    def init(seed, bases):
        by_target: dict[LoraTarget, dict[str, Array]] = {}
        for target, arrays in _arrays(config, model_config).items():
            key = jax.random.fold_in(jax.random.key(seed), LORA_TARGETS.index(target))
            shape, axes = arrays["lora_a"]
            bound = float(np.prod(shape[1:-1])) ** -0.5
            a = jax.random.uniform(key, shape, minval=-bound, maxval=bound, out_sharding=named_sharding(*axes))
            b = jnp.zeros(arrays["lora_b"].shape, out_sharding=named_sharding(*arrays["lora_b"].axes))
            by_target[target] = {"lora_a": a, "lora_b": b}
            if config.dora:
                equation, scaling = equation_of(target), config.scaling_of(target)
                norms = []
                for name in SLOTS[target].weights:  # computed as in the forward pass, so that their ratio is 1
                    part = part_of(by_target[target], target, name)
                    w = bases[target][name].astype(jnp.float32)
                    norms.append(_row_norm(equation, w, a, part["lora_b"], scaling))
                by_target[target]["magnitude"] = norms[0] if len(norms) == 1 else jnp.stack(norms, 1)
        return _tree(by_target)

    compiled = jax.jit(init, out_shardings=shardings)
    if mesh is None:
        return compiled(seed, bases)
    with jax.set_mesh(mesh):
        return compiled(seed, bases)


def merge_weight(equation: str, w: Any, part: dict[str, Any], scaling: float) -> Any:
    """One layer's W + scaling * B A in fp32, with DoRA's row lengths.

    `part` is one layer of `part_of`; numpy or jax arrays.
    """
    merged = _changed(equation, w.astype(np.float32), part["lora_a"], part["lora_b"], scaling)
    if "magnitude" not in part:
        return merged
    x, w_dims, _ = split_equation(equation)
    summed = tuple(i for i, letter in enumerate(w_dims) if letter in x)
    scale = part["magnitude"] / _length_of_rows(equation, merged)
    return merged * (np if isinstance(scale, np.ndarray) else jnp).expand_dims(scale, summed)


def lost(w: Any, exact: Any, merged: Any) -> Any:
    """The share of the change from `w` to `exact` that rounding to `merged` loses: length of the error over that of the
    change."""
    change, error = (((a.astype(np.float32) - b) ** 2).sum() for a, b in ((w, exact), (merged, exact)))
    return (error / (change + (change == 0))) ** 0.5


def adapted_weights(config: LoraConfig) -> dict[str, tuple[LoraTarget, str]]:
    """Path of each weight that an adapter changes -> (target, name of the weight)."""
    return {
        f"layers.{SLOTS[target].block}.{name}.weight": (target, name)
        for target in config.targets
        for name in SLOTS[target].weights
    }


def merge(params: Params, adapter: Adapter) -> Params:
    """`params` with the adapter merged into the weights: computed in fp32, cast once to the dtype of each weight."""
    changed: dict[str, dict[str, Params]] = {}
    for target, name in adapted_weights(adapter.config).values():
        block, equation, scaling = SLOTS[target].block, equation_of(target), adapter.config.scaling_of(target)
        w = jnp.asarray(params["layers"][block][name]["weight"])
        part = part_of(adapter.params["layers"][block][target], target, name)

        def merge_layer(layer, equation=equation, scaling=scaling):
            w, part = layer
            return merge_weight(equation, w, part, scaling).astype(w.dtype)

        with use_mesh_of(w):
            # Layer by layer: the whole stack in fp32 would take twice the memory of the weights.
            merged = jax.jit(lambda *stacks, f=merge_layer: jax.lax.map(f, stacks))(w, part)
        changed.setdefault(block, {})[name] = {"weight": merged}
    layers = params["layers"] | {block: params["layers"][block] | new for block, new in changed.items()}
    return params | {"layers": layers}
