"""The rules and the mesh, and what we rely on JAX for (docs/design.md, decision 3)."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bc2_jax import sharding
from bc2_jax.config import BAICHUAN2_13B, MeshConfig, ModelConfig, OptimizerConfig
from bc2_jax.model.baichuan import Baichuan2, init_params, param_shardings, split_model
from bc2_jax.model.layers import Embedding
from bc2_jax.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    ShardingRules,
    make_mesh,
    mesh_axes,
    named_sharding,
    reshard,
    rules_in_use,
    use_cpu_devices,
    use_mesh_of,
    use_rules,
)
from bc2_jax.train.optimizer import make_optimizer

TINY = ModelConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    position_embedding="alibi",
)  # fmt: skip


def test_specs():
    spec = DEFAULT_RULES.spec
    assert spec() == P()
    shards = ("fsdp", "fsdp_inner", "context")
    assert spec("layers", "embed", "heads", "head_dim") == P(None, shards, "tensor", None)
    assert spec(None, "batch", "sequence") == P(None, ("data", "fsdp", "fsdp_inner"), "context")
    assert spec("batch", None, "attention_heads", None) == P(
        ("data", "fsdp", "fsdp_inner"), None, ("tensor", "context"), None
    )


def test_unknown_axis_lists_the_legal_ones():
    with pytest.raises(ValueError, match="'head' is not known; legal names are batch, .*heads.*embed"):
        DEFAULT_RULES.spec("head")


@pytest.mark.parametrize("axes", [("batch", "embed"), ("heads", "ffn"), ("vocab", "vocab")])
def test_two_dimensions_on_one_mesh_axis(axes: tuple[str, str]):
    with pytest.raises(ValueError, match="the same mesh axis"):
        DEFAULT_RULES.spec(*axes)


def test_other_rules_are_other_values():
    rules = dataclasses.replace(DEFAULT_RULES, embed=("data", "fsdp"), vocab=None)
    assert rules.spec("vocab", "embed") == P(None, ("data", "fsdp"))
    with pytest.raises(TypeError):
        ShardingRules(hiden="tensor")


def test_rules_come_from_the_context(mesh_of):
    """What was compiled under other rules is not used again."""
    mesh, x = mesh_of(2, 2, 2), jnp.ones((8, 4))
    f = jax.jit(lambda x: reshard(x, "batch", "hidden"))
    other = dataclasses.replace(DEFAULT_RULES, batch="data", hidden="tensor")
    with jax.set_mesh(mesh):
        for _ in range(2):
            assert f(x).sharding.spec == DEFAULT_RULES.spec("batch", "hidden")
            with use_rules(other):
                assert rules_in_use() is other and mesh_axes("batch") == ("data",)
                assert f(x).sharding.spec == P("data", "tensor")
    assert rules_in_use() is DEFAULT_RULES


def test_mesh_order():
    """tensor varies fastest, data slowest."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "fsdp_inner", "context", "tensor")
    assert [d.id for d in mesh.devices.ravel()] == list(range(8))
    assert mesh.devices.shape == (2, 2, 1, 1, 2)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert make_mesh(MeshConfig(tensor=2, context=2)).devices.shape == (1, 2, 1, 2, 2)


@pytest.mark.parametrize(
    ("sides", "fsdp", "inner"),
    [((4, 4, 4), 64, 4), ((4, 4, 8), 128, 8), ((4, 4, 8), 64, 1), ((16, 16, 1), 256, 1), ((2, 2, 1), 4, 1)],
)
def test_the_longest_side_of_a_torus_is_a_stage_of_its_own(sides: tuple[int, ...], fsdp: int, inner: int):
    devices = [SimpleNamespace(coords=coords) for coords in np.ndindex(*sides)]
    assert sharding._second_stage(MeshConfig(fsdp=fsdp), devices) == inner
    assert sharding._second_stage(MeshConfig(fsdp=8), jax.devices()) == 1, "the CPU has no torus"


def test_the_first_stage(mesh_of):
    for shape, devices in (((2, 4, 1), 4), ((8, 1, 1), 1), ((1, 1, 2, 4), 4), ((1, 2, 1, 4), 2)):
        with jax.set_mesh(mesh_of(*shape)):
            assert sharding.first_stage() == devices
    assert sharding.first_stage() == 1


@pytest.mark.parametrize("on_plane", [False, True])
def test_gathered_weights_are_whole_and_in_order(on_plane: bool, mesh_of, monkeypatch):
    """In stages, and at once as on a 2-D torus."""
    monkeypatch.setattr(sharding, "_is_on_plane", lambda: on_plane)
    w = np.arange(48.0).reshape(16, 3)
    with jax.set_mesh(mesh_of(1, 2, 1, 4)):
        stored = reshard(jnp.asarray(w), "embed", None)
        assert stored.sharding.shard_shape(w.shape) == (2, 3)
        np.testing.assert_array_equal(jax.jit(lambda x: sharding.gather(x, "embed", None))(stored), w)
        cut = sharding.spec("embed", None)
        gather = jax.shard_map(lambda x: sharding.all_gather(x, 0), in_specs=cut, out_specs=cut)
        np.testing.assert_array_equal(jax.jit(gather)(stored), np.concatenate([w] * 8))


def test_mesh_must_be_explicit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="not Explicit.*make_mesh"):
        named_sharding("batch")


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.ones(4)
    assert named_sharding("batch") is None
    assert reshard(x, "batch") is x


def test_too_late_for_more_devices():
    jax.devices()
    with pytest.raises(ValueError, match="num_cpu_devices = 5 is not possible.*runs on 8 devices"):
        use_cpu_devices(5)
    use_cpu_devices(8)  # what is already so is not an error


def test_use_mesh_of(mesh_of):
    mesh = mesh_of(2, 2, 2)
    x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("data", "fsdp")))
    with use_mesh_of(x):
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    with use_mesh_of(jnp.ones(3)):
        assert jax.sharding.get_abstract_mesh().empty
    with jax.set_mesh(mesh_of(8, 1, 1)), use_mesh_of(jnp.ones(3)):
        assert jax.sharding.get_abstract_mesh() == mesh_of(8, 1, 1).abstract_mesh


def test_param_shardings_fit_the_parameters(mesh_of):
    """One entry for each dimension of each parameter, and every cut is even: 13B on 2 x 2 x 2."""
    mesh = mesh_of(2, 2, 2)
    shardings, shapes = param_shardings(BAICHUAN2_13B, mesh), split_model(BAICHUAN2_13B)[1]

    def check(shape, sharding):
        assert len(sharding.spec) == len(shape.shape)
        return sharding.shard_shape(shape.shape)

    shards = jax.tree.map(check, shapes, shardings)
    assert shards["embed_tokens"]["weight"] == shards["lm_head"]["weight"] == (125696 // 2, 5120 // 2)
    assert shards["layers"]["self_attn"]["q_proj"]["weight"] == (40, 2560, 20, 128)
    assert shards["layers"]["self_attn"]["o_proj"]["weight"] == (40, 20, 128, 2560)
    assert shards["layers"]["mlp"]["up_proj"]["weight"] == (40, 2560, 13696 // 2)
    assert shards["layers"]["mlp"]["down_proj"]["weight"] == (40, 13696 // 2, 2560)
    assert shards["norm"]["weight"] == (5120,)


def test_parameters_are_born_with_their_shardings_and_moments_inherit_them(mesh_of):
    mesh = mesh_of(2, 2, 2)
    wanted = jax.tree.map(lambda s: s.spec, param_shardings(TINY, mesh))

    def make():
        return nnx.to_pure_dict(nnx.split(Baichuan2(TINY, rngs=nnx.Rngs(0)))[1])

    params = init_params(TINY, 0, mesh)
    optimizer = make_optimizer(OptimizerConfig())
    with jax.set_mesh(mesh):
        moments = jax.jit(optimizer.init)(params)
        abstract = jax.eval_shape(make)
        abstract_moments = jax.eval_shape(optimizer.init, abstract)
    assert jax.tree.map(lambda x: x.sharding.spec, params) == wanted
    assert jax.tree.map(lambda x: x.sharding.spec, abstract) == wanted  # a restore target without any array
    for state in (moments, abstract_moments):
        for moment in (optax.tree.get(state, "mu"), optax.tree.get(state, "nu")):
            assert jax.tree.map(lambda x: x.sharding.spec, moment) == wanted


# ------------------------------------------------------------------------------------------------- facts about JAX


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def count_instructions(hlo: str, name: str) -> int:
    return len(re.findall(rf"= \S+ {name}(?:-start)?\(", hlo))


def test_the_embedding_table_stays_where_it_is(mesh_of):
    """Ids are gathered and the looked-up rows exchanged; no device ever holds more of the table than its part."""
    mesh = mesh_of(2, 2, 2)
    V, D = TINY.vocab_size, TINY.hidden_size
    ids = jax.ShapeDtypeStruct((8, 3), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    table = jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=NamedSharding(mesh, P("tensor", "fsdp")))
    embedding = nnx.eval_shape(lambda: Embedding(TINY, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(embedding)

    def look_up(table, ids):
        return nnx.merge(graphdef, {"weight": table})(ids, jnp.dtype("float32"))

    def gradient(table, ids):
        return jax.grad(lambda table: look_up(table, ids).sum())(table)

    with jax.set_mesh(mesh):
        texts = [compiled_text(function, table, ids) for function in (look_up, gradient)]
    for hlo in texts:
        assert f"f32[{V // 2},{D // 2}]" in hlo
        assert not re.search(rf"f32\[({V}|{V // 2}),{D}\]|f32\[{V},", hlo)
    assert count_instructions(texts[0], "all-gather") == 1 and re.search(r"= s32\S+ all-gather", texts[0])
    assert count_instructions(texts[0], "all-reduce") == 1  # over the parts of the vocabulary
    for hlo in texts:
        assert len(re.findall(r"\) all-to-all\(", hlo)) == 1


@pytest.mark.parametrize("mesh_kind", ["none", "auto"])
def test_a_spec_needs_an_explicit_mesh(mesh_kind: str):
    def product(x):
        return jnp.einsum("ij,jk->ik", x, x, out_sharding=P(None, None))

    if mesh_kind == "none":
        with pytest.raises(Exception, match="(?i)mesh|sharding"):
            jax.jit(product)(jnp.ones((8, 8)))
    else:
        auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(auto), pytest.raises(Exception, match="(?i)mesh|sharding|auto"):
            jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, out_sharding=P("data", None)))(jnp.ones((8, 8)))


def test_indexing_fails_on_a_cut_vocabulary(mesh_of):
    """Why the loss selects by iota == label."""
    mesh = mesh_of(2, 2, 2)
    logits = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P("data", "tensor")))
    labels = jax.device_put(np.zeros(4, np.int32), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        with pytest.raises(Exception, match="(?i)shard"):
            jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
        with pytest.raises(Exception, match="(?i)shard"):
            jax.jit(lambda x, i: jnp.take_along_axis(x, i[:, None], axis=-1))(logits, labels)


def test_a_constraint_only_asserts_and_reshard_moves(mesh_of):
    mesh = mesh_of(2, 2, 2)
    x = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P("data", "tensor")))
    with jax.set_mesh(mesh):
        jax.jit(lambda x: jax.lax.with_sharding_constraint(x, P("data", "tensor")))(x)
        with pytest.raises(AssertionError):
            jax.jit(lambda x: jax.lax.with_sharding_constraint(x, P()))(x)
        moved = jax.jit(lambda x: jax.reshard(x, P(None, ("fsdp", "tensor"))))(x)
    assert moved.sharding.spec == P(None, ("fsdp", "tensor"))
