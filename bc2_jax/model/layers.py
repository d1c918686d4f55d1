"""Weights, matmuls against sharded weights, RMSNorm, embedding, the SwiGLU feed-forward layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.kernels.transposed import multiply_transposed
from bc2_jax.model.equations import (
    ACTIVATION_AXES,
    EQUATIONS,
    move_model_axis_behind,
    move_to_front,
    split_equation,
    sum_dtype,
    weight_axes,
)
from bc2_jax.model.quantized import Quantized
from bc2_jax.sharding import (
    ShardingRules,
    current_chip,
    first_stage,
    gather,
    named_sharding,
    parts,
    platform,
    reduce_scatter,
    reshard,
    rules_in_use,
    spec,
    use_rules,
)
from bc2_jax.tpu.tiles import scatterable_columns


class Weight(nnx.Module):
    """A parameter named `weight`, fp32 at first, with the logical axis of each dimension."""

    def __init__(self, value: Array, axes: tuple[str | None, ...]):
        self.weight = nnx.Param(value, axes=axes)

    @classmethod
    def normal(cls, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], stddev: float) -> Weight:
        """N(0, stddev), each device making its own shard; the values do not depend on the mesh."""
        return Weight(stddev * jax.random.normal(rngs.params(), shape, out_sharding=named_sharding(*axes)), axes)


class Linear(Weight):
    """y = einsum(equation, x, weight) in the dtype of x, without bias; every matmul of a layer against a weight.

    The equation names the axes of x, weight and y (`model.equations`). Holds the stacked weights of all L layers; a
    call uses one layer's.
    """

    def __init__(self, equation: str, value: Array, name: str | None = None):
        """`value` is [L, ...] in the order of the equation's weight. With a `name`, one of `REMAT_NAMES`,
        the backward pass uses the weight that was gathered for the forward pass, if remat keeps it."""
        self.equation, self.name = equation, name
        super().__init__(value, self.stacked_axes)

    @classmethod
    def random(
        cls, equation: str, shape: tuple[int, ...], stddev: float, *, rngs: nnx.Rngs, name: str | None = None
    ) -> Linear:
        """Weights [L, ...] from N(0, stddev); `name` as in the constructor."""
        return cls(equation, cls.normal(rngs, shape, ("layers", *weight_axes(equation)), stddev).weight[...], name)

    @property
    def stacked_axes(self) -> tuple[str | None, ...]:
        """Logical axes of the stacked weights."""
        return ("layers", *weight_axes(self.equation))

    def __call__(self, x: Array) -> Array:
        return linear(self.equation, x, self.weight[...], self.name)

    def move_model_axis_behind(self) -> None:
        """Changes the storage from [L, D, N, H] to [L, N, D, H], or from [L, D, F] to [L, F, D]."""
        self.equation = move_model_axis_behind(self.equation)
        self.weight = nnx.Param(jnp.swapaxes(self.weight[...], 1, 2), axes=self.stacked_axes)


def linear(equation: str, x: Array, w: Array | Quantized, name: str | None = None) -> Array:
    """einsum(equation, x, w) in the dtype of x for a stored weight `w`; letters as in `Linear`.

    The weight is gathered in the compute dtype; its gradient is computed and reduced over the batch in fp32, directly
    into the layout of the stored weight. A quantized weight has no gradient. `name` as in `Linear`.
    """
    if isinstance(w, Quantized):
        return w.multiply(equation, x).astype(x.dtype)
    # Passed explicitly: the backward pass may be traced in another context.
    return _linear(equation, name, rules_in_use(), x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(equation: str, name: str | None, rules: ShardingRules, x: Array, w: Array) -> Array:
    with use_rules(rules):
        return _multiply(equation, x, _gathered(equation, w, x.dtype))


def _gathered(equation: str, w: Array, dtype: jnp.dtype) -> Array:
    """A stored weight for use: cast first, to halve the traffic, then gathered along `embed`."""
    return gather(w.astype(dtype), *weight_axes(equation))


def _matmul(equation: str, x: Array, y: Array, out_sharding: NamedSharding | None = None) -> Array:
    # Hardware accumulates in fp32; asked for bf16, XLA:CPU computes in upcast fp32 at half the speed.
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def _multiply(equation: str, x: Array, used: Array) -> Array:
    """`linear` with a gathered weight."""
    out_sharding = named_sharding(*(ACTIVATION_AXES[letter] for letter in split_equation(equation)[2]))
    y = jnp.einsum(equation, x, used, preferred_element_type=sum_dtype(equation, x), out_sharding=out_sharding)
    return y.astype(x.dtype)


def _linear_forward(
    equation: str, name: str | None, rules: ShardingRules, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    with use_rules(rules):
        axis = _model_axis(equation)
        moved = move_to_front(equation, axis)
        used = _gathered(moved, jnp.moveaxis(w, axis, 0), x.dtype)
        if name:
            used = checkpoint_name(used, name)
        y = _multiply(moved, x, used)
        return _row_major(y) if equation.endswith("BTD") else y, (x, w, used if name else None)


def _model_axis(equation: str) -> int:
    """The dimension of the weight that training on a TPU mesh moves to the front; 0 for none.

    Along the model dimension shards are gathered and gradients scattered. In front, that moves whole blocks. As the
    last one, in o_proj and down_proj, it would copy the gathered weight to another layout; this copies the shard.
    """
    is_sharded = platform() == "tpu" and parts("embed") > 1
    return max(split_equation(equation)[1].find("D"), 0) if is_sharded else 0


def _row_major(x: Array) -> Array:
    """`x` with its last dimension fastest in the memory of a TPU mesh.

    Left to itself the compiler gives hidden states or gradients a layout in which it then copies what the other pass
    saves or reads. On a sharded array the constraint would gather it, hence `shard_map`.
    """
    if named_sharding() is None or platform() != "tpu":
        return x
    layout, cut = Layout(major_to_minor=tuple(range(x.ndim))), jax.typeof(x).sharding.spec
    return jax.shard_map(lambda x: with_layout_constraint(x, layout), in_specs=cut, out_specs=cut)(x)


def _pad_columns(x: Array, dims: str, padding: int) -> Array:
    """`x` with zeros after its feed-forward columns, if `dims` has them."""
    return jnp.pad(x, [(0, padding if dim == "F" else 0) for dim in dims])


def _linear_backward(equation, name, rules, residuals, dy):
    x, w, used = residuals
    with use_rules(rules):
        axis = _model_axis(equation)
    equation, w = move_to_front(equation, axis), jnp.moveaxis(w, axis, 0)
    x_dims, w_dims, y_dims = split_equation(equation)

    weight_gradient = functools.partial(multiply_transposed, f"{x_dims},{y_dims}->{w_dims}")

    with use_rules(rules):
        x_sharding = None if named_sharding() is None else jax.typeof(x).sharding
        used = _gathered(equation, w, x.dtype) if used is None else used
        dx = _matmul(f"{y_dims},{w_dims}->{x_dims}", dy, used, x_sharding)
        dx = _row_major(dx.astype(x.dtype)) if x.ndim == 3 else dx.astype(x.dtype)
        if x_sharding is None:
            dw = weight_gradient(x, dy)
        else:
            padding = 0
            # On v6e padding would prevent scatters; others have no SparseCores or were not tried. An adapter's matrices
            # with F have no D, along which they would be scattered.
            if {"D", "F"} <= set(w_dims) and current_chip() == "v5p":
                columns = w.shape[w_dims.index("F")] // parts("ffn")  # of one device
                padding = scatterable_columns(w.shape[w_dims.index("D")], columns, first_stage()) - columns

            def scattered_gradient(x: Array, dy: Array) -> Array:
                x, dy = (_pad_columns(z, dims, padding) for z, dims in ((x, x_dims), (dy, y_dims)))
                dw = reduce_scatter(weight_gradient(x, dy), *weight_axes(equation))
                if not padding:
                    return dw
                # libtpu fails on shards smaller than a tile if it moves the slice into the scatter.
                axis = w_dims.index("F")
                return jax.lax.slice_in_dim(jax.lax.optimization_barrier(dw), 0, dw.shape[axis] - padding, axis=axis)

            dw = jax.shard_map(
                scattered_gradient,
                in_specs=(x_sharding.spec, spec(*(ACTIVATION_AXES[letter] for letter in y_dims))),
                out_specs=spec(*weight_axes(equation)),
            )(x, dy)
    return dx, jnp.moveaxis(dw.astype(w.dtype), 0, axis)


_linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last dimension; statistics and scaling in fp32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(Weight):
    """RMSNorm over the model dimension; `stack` is (L,) for the stacked weights of all layers."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        axes = ("layers", None) if stack else (None,)
        super().__init__(jnp.ones((*stack, config.hidden_size)), axes)
        self.eps = config.rms_norm_eps

    def __call__(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.weight[...], self.eps)


class Embedding(Weight):
    """Token embedding; the row of the padding token starts at zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        table = Weight.normal(rngs, shape, axes, config.initializer_range).weight[...]
        is_padding = reshard(jnp.arange(config.vocab_size)[:, None] == config.pad_token_id, "vocab", None)
        super().__init__(jnp.where(is_padding, 0, table), axes)

    def __call__(self, input_ids_BT: Array, dtype: jnp.dtype) -> Array:
        # Moves ids, not the table: each device looks up its columns for the rows of its whole fsdp group, and exchanges
        # give it its own rows whole. The compiler alone would replicate the table.
        ids_BT = reshard(input_ids_BT, "lookup_batch", None)
        sharding = named_sharding("lookup_batch", None, "embed")
        x_BTD = self.weight[...].at[ids_BT].get(out_sharding=sharding).astype(dtype)
        # Sequences first, then rows: in a single exchange every device would hold the whole batch.
        x_BTD = reshard(x_BTD, "lookup_batch", "sequence", "lookup_embed")
        return reshard(x_BTD, "batch", "sequence", "hidden")


class MLP(nnx.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        L, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        std = config.initializer_range
        self.gate_proj = Linear.random(EQUATIONS["gate_proj"], (L, D, F), std, rngs=rngs)
        self.up_proj = Linear.random(EQUATIONS["up_proj"], (L, D, F), std, rngs=rngs)
        name = "down_proj" if "down_proj" in compute.kept else None
        self.down_proj = Linear.random(EQUATIONS["down_proj"], (L, F, D), std, rngs=rngs, name=name)

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        return self.down_proj(jax.nn.silu(gate_BTF) * up_BTF)
