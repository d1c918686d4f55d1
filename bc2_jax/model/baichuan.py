"""Baichuan 2 (paper section 2): embedding, L decoder layers, final norm, head; the same code for 7B and 13B.

`Backbone` is the model without its head, shared with the reward model (`model/reward.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding

from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.cached import KVCache, Place
from bc2_jax.kernels.segments import positions_of
from bc2_jax.model.attention import SelfAttention
from bc2_jax.model.head import Head
from bc2_jax.model.layers import MLP, Embedding, RMSNorm
from bc2_jax.model.position import alibi_slopes, make_rope, stretch_rope, stretch_slopes
from bc2_jax.model.remat import remat
from bc2_jax.sharding import parts, reshard, spec, use_mesh_of

Params = dict[str, Any]
DEFAULT_COMPUTE = ComputeConfig()


class DecoderLayer(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)). Holds the stacked weights of all layers; a call uses one layer."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        stack = (config.num_hidden_layers,)
        self.input_layernorm = RMSNorm(config, stack)
        self.self_attn = SelfAttention(config, compute, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, stack)
        self.mlp = MLP(config, compute, rngs=rngs)

    def __call__(self, h_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None) -> Array:
        with jax.named_scope("self_attn"):
            h_BTD += self.self_attn(self.input_layernorm(h_BTD), tokens, rope)
        return self._feed_forward(h_BTD)

    def extend(
        self, h_RTD: Array, place: Place, rope: tuple[Array, Array] | None, slopes_RN: Array | None, cache: KVCache,
        layer: Array,
    ) -> tuple[Array, KVCache]:  # fmt: skip
        """The layer for new tokens, whose keys and values are added to the cache."""
        with jax.named_scope("self_attn"):
            y_RTD, cache = self.self_attn.extend(self.input_layernorm(h_RTD), place, rope, slopes_RN, cache, layer)
            h_RTD += y_RTD
        return self._feed_forward(h_RTD), cache

    def _feed_forward(self, h_BTD: Array) -> Array:
        with jax.named_scope("mlp"):
            return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class Backbone(nnx.Module):
    """Embedding, layers and final norm.

    Parameters have their PyTorch names without the leading `model.`, with stacked layers.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, rngs=rngs)
        self.layers = DecoderLayer(config, compute, rngs=rngs)
        self.norm = RMSNorm(config)
        self.config, self.compute = config, compute

    def hidden_states(
        self, input_ids: Array, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """The head's input, [B, T, D] in the compute dtype; arguments as for `Baichuan2.__call__`."""
        return self.norm(self._run_layers(input_ids, positions, segment_ids)[0])

    def every_hidden_state(
        self, input_ids: Array, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """[L + 1, B, T, D]: after the embedding, after each layer but the last, after the final norm."""
        with use_mesh_of(self.norm.weight[...]):
            h_BTD, before = self._run_layers(input_ids, positions, segment_ids, keep=True)
            return jnp.concatenate([before, self.norm(h_BTD)[None]])

    def extend(
        self, ids_RT: Array, place: Place, cache: KVCache, stretch_R: Array | None = None, method: str = "ntk"
    ) -> tuple[Array, KVCache]:
        """`hidden_states` of T new tokens of R sequences whose earlier tokens are in the cache, and the new cache.

        R is the number of cache rows or fewer: equally many from each shard of the batch, in order. `stretch_R` (fp32)
        and `method` are those of `LongContext`. Inference only: the cache has no gradient.
        """
        positions_RT = jnp.maximum(place.start, 0)[:, None] + jnp.arange(ids_RT.shape[1])
        ids_RT, positions_RT = (reshard(x, "batch", "sequence") for x in (ids_RT, positions_RT))
        rope, slopes_RN = self._place_tokens(positions_RT, stretch_R, method)
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(carry, layer):
            index, params = layer
            h_RTD, cache = carry
            return nnx.merge(graphdef, params).extend(h_RTD, place, rope, slopes_RN, cache, index), None

        carry = self.embed_tokens(ids_RT, jnp.dtype(self.compute.dtype)), cache
        layers = (jnp.arange(self.config.num_hidden_layers), stacked)
        h_RTD, cache = jax.lax.scan(run_layer, carry, layers)[0]
        return self.norm(h_RTD), cache

    def _place_tokens(
        self, positions_RT: Array, stretch_R: Array | None, method: str
    ) -> tuple[tuple[Array, Array] | None, Array | None]:
        """RoPE's rotations or ALiBi's slopes [R, N] for rows of new tokens."""
        config = self.config
        if stretch_R is not None:
            stretch_R = reshard(stretch_R, "batch")
        if config.position_embedding == "rope":
            if stretch_R is None:
                return make_rope(positions_RT, config.head_dim, config.rope_theta), None
            trained = config.model_max_length
            return stretch_rope(positions_RT, config.head_dim, config.rope_theta, trained, stretch_R, method), None
        slopes = alibi_slopes(config.num_attention_heads)
        if stretch_R is None:
            slopes_RN = jnp.broadcast_to(slopes, (len(positions_RT), len(slopes)))
        else:
            slopes_RN = stretch_slopes(slopes, stretch_R)
        return None, reshard(slopes_RN, "batch", "attention_heads")

    def _run_layers(self, input_ids, positions, segment_ids, keep: bool = False):
        if input_ids.shape[1] % parts("sequence"):
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} columns; the mesh needs a multiple of {parts('sequence')}."
            )
        if positions is None:  # counting them needs whole sequences
            input_ids = reshard(input_ids, "batch", None)
            segment_ids = None if segment_ids is None else reshard(segment_ids, "batch", None)
        # A caller's arrays may have any layout.
        given = (input_ids, *place_tokens(input_ids, positions, segment_ids))
        input_ids, positions, segment_ids = (reshard(x, "batch", "sequence") for x in given)
        tokens = Tokens(positions, segment_ids)
        rope = None
        if self.config.position_embedding == "rope":
            rope = make_rope(tokens.positions, self.config.head_dim, self.config.rope_theta)
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(h_BTD, params):
            out = nnx.merge(graphdef, params)(h_BTD, tokens, rope)
            return out, h_BTD if keep else None

        run_layer = remat(run_layer, self.compute)
        h_BTD = self.embed_tokens(input_ids, jnp.dtype(self.compute.dtype))
        if self.compute.scan_layers:
            return jax.lax.scan(run_layer, h_BTD, stacked)
        kept = []
        for layer in unstack_layers(stacked):
            h_BTD, before = run_layer(h_BTD, layer)
            kept.append(before)
        return h_BTD, stack_layers(kept)


class Baichuan2(Backbone):
    """The language model."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE, *, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs=rngs)
        self.lm_head = Head(config, rngs=rngs)

    def __call__(self, input_ids: Array, positions: Array | None = None, segment_ids: Array | None = None) -> Array:
        """Logits [B, T, V] in fp32 of token ids [B, T].

        `segment_ids` int32 [B, T]: a token sees earlier tokens of its segment and of its trunk's (`kernels.segments`);
        0 is padding, left or right, like the attention mask of the released 13B code. `positions` int32 [B, T] default
        to the index within the segment, in a branch counted from the length of its trunk. Raises ValueError for shapes
        that do not agree.
        """
        with use_mesh_of(self.norm.weight[...]):
            return self.lm_head(self.hidden_states(input_ids, positions, segment_ids))


def place_tokens(input_ids: Array, positions: Array | None, segment_ids: Array | None) -> Tokens:
    """Positions and segments of [B, T] token ids; by default one segment and positions from its start."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {input_ids.shape}; it must be [batch, length].")
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {value.shape}; it must be that of input_ids, {input_ids.shape}.")
    segment_ids = jnp.ones_like(input_ids, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    return Tokens((positions_of(segment_ids) if positions is None else positions).astype(jnp.int32), segment_ids)


def unstack_layers(stacked: Any) -> list[Any]:
    """A tree of arrays [L, ...] -> L trees of arrays [...]."""
    leaves, treedef = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*(jnp.unstack(x) for x in leaves), strict=True)]


def stack_layers(layers: list[Any]) -> Any:
    """The inverse of `unstack_layers`."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)


def split_model(
    config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE, kind: type[Backbone] = Baichuan2
) -> tuple[Any, Params, Params]:
    """(graphdef, abstract parameters, logical axes) of a model of class `kind`; allocates nothing.

    `nnx.merge(graphdef, params)` makes the model from a nested dict of arrays shaped like the abstract parameters.
    """
    graphdef, state = _split_abstract(config, compute, kind, jax.sharding.get_abstract_mesh())
    axes = jax.tree.map(lambda p: p.axes, state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


@functools.lru_cache(maxsize=64)
def _split_abstract(
    config: ModelConfig, compute: ComputeConfig, kind: type[Backbone], _mesh: AbstractMesh
) -> tuple[Any, Any]:
    """Cached, since restoring, conversion and every program call it and tracing takes 0.1 s. The mesh in use is part of
    the key: abstract values contain it."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, compute, rngs=nnx.Rngs(0))))


def param_shardings(config: ModelConfig, mesh: Mesh, kind: type[Backbone] = Baichuan2) -> Params:
    """NamedSharding of every parameter on `mesh`."""
    axes = split_model(config, kind=kind)[2]
    return jax.tree.map(lambda a: NamedSharding(mesh, spec(*a)), axes, is_leaf=lambda a: isinstance(a, tuple))


def abstract_params(
    config: ModelConfig, mesh: Mesh | None, dtype: DType = "float32", kind: type[Backbone] = Baichuan2
) -> Params:
    """ShapeDtypeStructs of the parameters, sharded on `mesh` or on one device, to restore onto."""
    shapes = split_model(config, kind=kind)[1]
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one_device, shapes) if mesh is None else param_shardings(config, mesh, kind)
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, shardings)


def init_params(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
    """Initial fp32 parameters, each made in shards on its devices.

    N(0, initializer_range) for linear and embedding weights, the padding row 0, norms 1, the head U(+-1 / sqrt(D)). The
    values do not depend on the mesh.
    """

    # LLVM takes seconds to optimise the random bits of each weight, which are drawn only once.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    with jax.set_mesh(mesh):
        return jax.jit(_init, static_argnums=0, compiler_options=options)(config, seed)


def _init(config: ModelConfig, seed: Array | int) -> Params:
    model = Baichuan2(config, rngs=nnx.Rngs(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.split(model)[1])
