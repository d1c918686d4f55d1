"""LoRA (arXiv 2106.09685): low-rank adapters beside the weights of a model, with rsLoRA and DoRA.

An adapter is a tree of fp32 arrays apart from the model's own: `lora_a` [L, in, r] and `lora_b` [L, r, out] for each
target, where in and out are the dimensions of the weight (D; N, H; F), and with DoRA `magnitude` [L, out]. W_pack is
q_proj, k_proj and v_proj with one `lora_a` for all three; its out is 3, N, H.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig, LoraTarget
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.layers import ACTIVATION_AXES, WEIGHT_AXES, Linear, linear, split_equation
from bc2_jax.sharding import named_sharding, reshard, spec


class Adapter(NamedTuple):
    """Trained adapters and what they mean."""

    config: LoraConfig
    params: Params
    """{"layers": {"self_attn": {"q_proj": {"lora_a", "lora_b", "magnitude"}, ...}, "mlp": {...}}}, fp32."""


class Slot(NamedTuple):
    """Where the adapter of one target sits."""

    block: str
    """Module of a layer that holds the weights."""
    weights: tuple[str, ...]
    """The weights; several are rows of one released matrix."""


_QKV = ("q_proj", "k_proj", "v_proj")
SLOTS: dict[LoraTarget, Slot] = {
    target: Slot("mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn",
                 _QKV if target == "W_pack" else (target,))
    for target in LORA_TARGETS
}  # fmt: skip


class DropoutKey(nnx.Variable):
    """Random bits of each layer, uint32 [L, ...] as `jax.random.key_data` gives them."""


class Dimensions(NamedTuple):
    """The letters of a matmul's equation (`layers.Linear`), apart."""

    x: str
    y: str
    into: str
    """Dimensions of the weight that are summed over."""
    out: str
    """The others, in the weight's order."""

    @classmethod
    def of(cls, equation: str) -> Dimensions:
        x, w, y = split_equation(equation)
        return cls(x, y, "".join(c for c in w if c in x), "".join(c for c in w if c not in x))

    @property
    def equation_a(self) -> str:
        return f"{self.x},{self.into}R->BTR"

    @property
    def equation_b(self) -> str:
        return f"BTR,R{self.out}->{self.y}"


class LoraLinear(Linear):
    """y = W x + scaling * B A x; with DoRA (arXiv 2402.09353) each row of W + scaling * B A has a trained length.

    W and A, B are multiplied one after the other: a forward pass that adds B A to W has the gradient of W in its
    backward pass. As in PEFT, the rows' lengths before they are replaced count as constants.
    """

    def __init__(
        self, base: Linear, lora_a: Linear, lora_b: Linear, scaling: float, magnitude: Array | None = None,
        dropout: float = 0.0, keys: Array | None = None,
    ):  # fmt: skip
        """`lora_a` and `lora_b` are modules, so that several weights may share one; `keys` [L] drop, None does not."""
        super().__init__(base.equation, base.weight[...])
        self.lora_a, self.lora_b, self.scaling, self.dropout = lora_a, lora_b, scaling, dropout
        self.use_dora, self.use_dropout = magnitude is not None, keys is not None and dropout > 0
        if magnitude is not None:
            out = Dimensions.of(base.equation).out
            self.magnitude = nnx.Param(magnitude, axes=("layers", *(WEIGHT_AXES[letter] for letter in out)))
            self.is_row_scale = False  # `magnitude` is what is trained
        if self.use_dropout:
            self.key_impl = jax.random.key_impl(keys)
            self.dropout_key = DropoutKey(jax.random.key_data(keys))

    def __call__(self, x: Array) -> Array:
        w, kept = self.weight[...], self._drop(x) if self.use_dropout else x
        y = linear(self.equation, x, w)
        change = self.lora_b(self.lora_a(kept) * self.scaling)
        if not self.use_dora:
            return y + change
        scale = reshard(self._row_scale(), *(ACTIVATION_AXES[letter] for letter in Dimensions.of(self.equation).out))
        if not self.use_dropout:
            return ((y + change).astype(jnp.float32) * scale).astype(x.dtype)
        dropped = linear(self.equation, kept, w).astype(jnp.float32)
        return (y + (scale - 1) * dropped + scale * change).astype(x.dtype)

    def _drop(self, x: Array) -> Array:
        """`x` with a share of `dropout` set to zero; which values does not depend on the mesh."""
        key = jax.random.wrap_key_data(self.dropout_key[...], impl=self.key_impl)
        sharding = named_sharding(*(ACTIVATION_AXES[letter] for letter in Dimensions.of(self.equation).x))
        is_kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape, out_sharding=sharding)
        return jnp.where(is_kept, x / (1 - self.dropout), 0).astype(x.dtype)

    def _row_scale(self) -> Array:
        """What each row of W + scaling * B A is multiplied with, in fp32; [L, out] where the weights are stacked."""
        if self.is_row_scale:
            return self.magnitude[...]
        weights = (x.weight[...].astype(jnp.float32) for x in (self, self.lora_a, self.lora_b))
        return self.magnitude[...] / jax.lax.stop_gradient(_row_norm(self.equation, *weights, self.scaling))

    def fix_row_scale(self) -> None:
        """Computes once what the rows are multiplied with, for calls that follow with the very same weights."""
        if self.use_dora:
            self.magnitude, self.is_row_scale = nnx.Param(self._row_scale(), axes=self.magnitude.axes), True


def _row_norm(equation: str, w, a, b, scaling: float):
    """Length of each row of W + scaling * B A; arrays of one layer or all, of numpy or jax."""
    changed = _changed(equation, w, a, b, scaling)
    x, w_dims, _ = split_equation(equation)
    summed = tuple(i - len(w_dims) for i, letter in enumerate(w_dims) if letter in x)
    return (changed * changed).sum(axis=summed) ** 0.5


def _changed(equation: str, w, a, b, scaling: float):
    """W + scaling * B A in the order of W."""
    dims, letters = Dimensions.of(equation), split_equation(equation)[1]
    einsum = functools.partial(np.einsum, optimize=True) if isinstance(w, np.ndarray) else jnp.einsum
    return w + scaling * einsum(f"...{dims.into}R,...R{dims.out}->...{letters}", a, b)


def with_adapter(model: Baichuan2, config: LoraConfig, params: Params, dropout_key: Array | None = None) -> Baichuan2:
    """`model` with the adapter of `config` and `params` beside its weights, all of whose arrays it shares.

    With a key, a share of config.dropout of the adapter's inputs is zero: for each key others, which the mesh does not
    change. Differentiable with respect to `params`.
    """
    model = nnx.merge(*nnx.split(model))  # modules of its own around the same arrays
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
        for i, (name, base) in enumerate(zip(slot.weights, bases, strict=True)):
            b, magnitude = arrays["lora_b"], arrays["magnitude"] if config.dora else None
            if len(bases) > 1:
                b, magnitude = b[:, :, i], None if magnitude is None else magnitude[:, i]
            lora_b = Linear(dims.equation_b, b)
            module = LoraLinear(base, lora_a, lora_b, config.scaling_of(target), magnitude, config.dropout, keys)
            setattr(block, name, module)
    return model


class _Array(NamedTuple):
    """Shape and logical axes of one array of an adapter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@functools.cache
def _bases(config: ModelConfig) -> dict[LoraTarget, Linear]:
    """Abstract weights of each target, the first where it has several."""
    model = nnx.eval_shape(lambda: Baichuan2(config, rngs=nnx.Rngs(0)))
    return {t: getattr(getattr(model.layers, slot.block), slot.weights[0]) for t, slot in SLOTS.items()}


def equation_of(target: LoraTarget, config: ModelConfig) -> str:
    """The equation of the matmul of a target's weights, as they are stored."""
    return _bases(config)[target].equation


def _arrays(config: LoraConfig, model_config: ModelConfig) -> dict[LoraTarget, dict[str, _Array]]:
    arrays = {}
    for target in config.targets:
        base = _bases(model_config)[target]
        dims, rank, L = Dimensions.of(base.equation), config.rank_of(target), model_config.num_hidden_layers
        size = dict(zip(split_equation(base.equation)[1], base.weight.shape[1:], strict=True))
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
    """ShapeDtypeStructs of an adapter's fp32 arrays, cut over `mesh` as their weights are, or whole on one device."""

    def place(array: _Array) -> jax.ShapeDtypeStruct:
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        sharding = one_device if mesh is None else NamedSharding(mesh, spec(*array.axes))
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)

    by_target = _arrays(config, model_config)
    return _tree({t: {name: place(array) for name, array in arrays.items()} for t, arrays in by_target.items()})


def init_adapter(
    config: LoraConfig, model_config: ModelConfig, base_params: Params, seed: int, mesh: Mesh | None
) -> Params:
    """An adapter that changes nothing yet, each array born on its devices.

    A: U(+-1 / sqrt(inputs)), B: 0, DoRA's magnitudes the lengths of the rows of `base_params`, whose dtype may be any.
    The values do not depend on the mesh, nor those of a target on the others.
    """
    bases = {t: [base_params["layers"][SLOTS[t].block][name]["weight"] for name in SLOTS[t].weights]
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
            if config.dora:  # as the forward pass computes it, whose ratio of the two is 1
                parts = [b] if len(bases[target]) == 1 else [b[:, :, i] for i in range(len(bases[target]))]
                equation, scaling = equation_of(target, model_config), config.scaling_of(target)
                norms = [
                    _row_norm(equation, w.astype(jnp.float32), a, part, scaling)
                    for w, part in zip(bases[target], parts, strict=True)
                ]
                by_target[target]["magnitude"] = norms[0] if len(norms) == 1 else jnp.stack(norms, 1)
        return _tree(by_target)

    compiled = jax.jit(init, out_shardings=shardings)
    if mesh is None:
        return compiled(seed, bases)
    with jax.set_mesh(mesh):
        return compiled(seed, bases)
