"""Weights, matmuls against sharded weights, RMSNorm, embedding and the SwiGLU feed-forward layer."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.sharding import ShardingRules


class Weight(nnx.Module):
    """One parameter named `weight`, fp32 at birth, with the logical axis of each dimension."""

    def __init__(self, value: Array, axes: tuple[str | None, ...]):
        self.weight = nnx.Param(value, axes=axes)

    @classmethod
    def normal(
        cls, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], stddev: float, rules: ShardingRules
    ) -> Weight:
        """N(0, stddev), each device making its own part; the values do not depend on the mesh."""
        return Weight(stddev * jax.random.normal(rngs.params(), shape, out_sharding=rules.sharding(*axes)), axes)


def gather(w: Array, axes: tuple[str | None, ...], rules: ShardingRules, dtype: jnp.dtype) -> Array:
    """A stored weight as it is used: cast first, so that half the bytes travel, then gathered along `embed`."""
    return rules.gather(w.astype(dtype), *axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def linear(
    equation: str, x: Array, w: Array, axes: tuple[str | None, ...], out_axes: tuple[str | None, ...],
    rules: ShardingRules,
) -> Array:  # fmt: skip
    """einsum(equation, x, w) in the dtype of x, for a stored weight `w` with logical `axes`.

    The weight is gathered in the compute dtype; its gradient is computed and reduced over the batch in fp32, straight
    into the layout in which the weight is stored.
    """
    return _linear_forward(equation, x, w, axes, out_axes, rules)[0]


def _matmul(equation: str, x: Array, y: Array, out_sharding: NamedSharding | None = None) -> Array:
    # fp32 is what the hardware accumulates in; asked for bf16, XLA:CPU computes in upcast fp32, at half the speed.
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def _linear_forward(equation, x, w, axes, out_axes, rules):
    used = gather(w, axes, rules, x.dtype)
    y = jnp.einsum(
        equation, x, used, preferred_element_type=_sum_dtype(equation, x), out_sharding=rules.sharding(*out_axes)
    )
    return y.astype(x.dtype), (x, w)


def _sum_dtype(equation: str, x: Array) -> jnp.dtype:
    """That in which products leave the hardware: fp32, but where TPUs add theirs up, that of x: half the bytes travel.

    Each chip's own sum is fp32 in either case.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None or device.platform != "tpu":
        return jnp.dtype(jnp.float32)
    x_dims, y_dims = equation.split(",")[0], equation.split("->")[1]
    spec = jax.typeof(x).sharding.spec  # type: ignore[attr-defined]  # jax declares the base class
    cut = [axes for dim, axes in zip(x_dims, spec, strict=True) if dim not in y_dims and axes is not None]
    sizes = [mesh.shape[axis] for axes in cut for axis in ((axes,) if isinstance(axes, str) else axes)]
    return x.dtype if math.prod(sizes) > 1 else jnp.dtype(jnp.float32)


def _linear_backward(equation, axes, out_axes, rules, residuals, dy):
    x, w = residuals
    (x_dims, w_dims), y_dims = equation.split("->")[0].split(","), equation.split("->")[1]
    x_sharding = None if rules.sharding() is None else jax.typeof(x).sharding
    dx = _matmul(f"{y_dims},{w_dims}->{x_dims}", dy, gather(w, axes, rules, x.dtype), x_sharding)

    def weight_gradient_on_cpu(x: Array, dy: Array) -> Array:
        # XLA:CPU has a fast bf16 kernel for rows times columns, not for the transposed left side of x.T @ dy. The
        # barrier keeps it from folding the transposition back; the batch dimension of 1 gives the copy a plain layout.
        count = len(set(x_dims) - set(w_dims))
        x_t = jax.lax.optimization_barrier(jnp.moveaxis(x, range(count), range(-count, 0)))[None]
        moved = x_dims[count:] + x_dims[:count]
        return _matmul(f"Z{moved},Z{y_dims}->Z{w_dims}", x_t, dy[None])[0]

    def weight_gradient(x: Array, dy: Array) -> Array:
        """One device's rows of the batch, in fp32."""
        matmul = functools.partial(_matmul, f"{x_dims},{y_dims}->{w_dims}")
        return jax.lax.platform_dependent(x, dy, cpu=weight_gradient_on_cpu, default=matmul)

    if rules.sharding() is None:
        dw = weight_gradient(x, dy)
    else:
        dw = jax.shard_map(
            lambda x, dy: rules.reduce_scatter(weight_gradient(x, dy), axes.index("embed")),
            in_specs=(x_sharding.spec, rules.spec(*out_axes)),
            out_specs=rules.spec(*axes),
        )(x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last dimension, statistics and scaling in fp32; returns the dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(Weight):
    """RMSNorm over the model dimension; `stack` is (L,) where the weights of all layers are stacked."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        axes = ("layers", None) if stack else (None,)
        super().__init__(jnp.ones((*stack, config.hidden_size)), axes)
        self.eps = config.rms_norm_eps

    def __call__(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.weight[...], self.eps)


class Embedding(Weight):
    """Token embedding; the row of the padding token starts at zero."""

    def __init__(self, config: ModelConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        table = Weight.normal(rngs, shape, axes, config.initializer_range, rules).weight[...]
        is_padding = rules.reshard(jnp.arange(config.vocab_size)[:, None] == config.pad_token_id, "vocab", None)
        super().__init__(jnp.where(is_padding, 0, table), axes)
        self.rules = rules

    def __call__(self, input_ids_BT: Array, dtype: jnp.dtype) -> Array:
        # The ids travel, not the table: each device looks up its columns for the rows of its whole fsdp group, and
        # exchanges give it its own rows whole. Left to itself the compiler replicates the table.
        ids_BT = self.rules.reshard(input_ids_BT, "lookup_batch", None)
        sharding = self.rules.sharding("lookup_batch", None, "embed")
        x_BTD = self.weight[...].at[ids_BT].get(out_sharding=sharding).astype(dtype)
        # Sequences first, then rows: exchanged in one step, the compiler makes every device hold the whole batch.
        x_BTD = self.rules.reshard(x_BTD, "lookup_batch", "sequence", "lookup_embed")
        return self.rules.reshard(x_BTD, "batch", "sequence", "hidden")


class MLP(nnx.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x)). Holds all L layers' weights; a call uses one layer's."""

    def __init__(self, config: ModelConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        L, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        into, out, std = ("layers", "embed", "ffn"), ("layers", "ffn", "embed"), config.initializer_range
        self.gate_proj = Weight.normal(rngs, (L, D, F), into, std, rules)
        self.up_proj = Weight.normal(rngs, (L, D, F), into, std, rules)
        self.down_proj = Weight.normal(rngs, (L, F, D), out, std, rules)
        self.transposed = False
        """Whether gate_proj and up_proj hold [L, F, D]."""
        self.rules = rules

    def __call__(self, x_BTD: Array) -> Array:
        into, equation = ("embed", "ffn"), "BTD,DF->BTF"
        if self.transposed:
            into, equation = ("ffn", "embed"), "BTD,FD->BTF"
        inner = ("batch", "sequence", "ffn")
        gate_BTF = linear(equation, x_BTD, self.gate_proj.weight[...], into, inner, self.rules)
        up_BTF = linear(equation, x_BTD, self.up_proj.weight[...], into, inner, self.rules)
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        y_BTD = linear(
            "BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_proj.weight[...], ("ffn", "embed"),
            ("batch", "sequence", "hidden"), self.rules,
        )  # fmt: skip
        return checkpoint_name(y_BTD, "down")


# What each remat policy keeps of a layer, by the names given above and in attention.py.
ATTENTION = ("attention", "attention_lse")
PROJECTIONS = ("q", "k", "v", *ATTENTION, "o")
MATMULS = (*PROJECTIONS, "gate", "up", "down")


def remat(function, compute: ComputeConfig):
    """`function` with its intermediate values kept or recomputed as `compute.remat` says."""
    policies = jax.checkpoint_policies
    match compute.remat:
        case "none":
            return function
        case "full":
            policy = policies.nothing_saveable
        case "save_dots":
            policy = policies.save_only_these_names(*MATMULS)
        case "save_projections":
            policy = policies.save_only_these_names(*PROJECTIONS)
        case "save_attention":
            policy = policies.save_only_these_names(*ATTENTION)
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[], names_which_can_be_offloaded=list(MATMULS),
                offload_src="device", offload_dst="pinned_host",
            )  # fmt: skip
    return jax.checkpoint(function, policy=policy, prevent_cse=not compute.scan_layers)
