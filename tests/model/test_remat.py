"""What a layer keeps for the backward pass is not computed a second time."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.config.compute import REMAT_NAMES
from bc2_jax.config.lora import LoraConfig
from bc2_jax.model.baichuan import split_model
from bc2_jax.model.lora import abstract_adapter, with_adapter

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, position_embedding="alibi",
    vocab_size=64,
)  # fmt: skip
MATMULS = dict.fromkeys(REMAT_NAMES, 1) | {"attention": 2, "down_proj": 0}
"""In the computation of each: scores and their product with the values in attention, none in a weight, else one."""


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Those of `jaxpr` and of every function and loop in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)):
                yield from equations(getattr(inner, "jaxpr", inner))


def count_in_gradient(remat: str, primitive: str, lora: LoraConfig | None = None) -> int:
    """Operations called `primitive` in the program of a loss and its gradient, with each loop's body once."""
    compute = ComputeConfig(dtype="float32", attention_block=16, remat=remat)
    graphdef, params, _ = split_model(MODEL, compute)
    trained = abstract_adapter(lora, MODEL, None) if lora else params

    def loss(trained, params, ids):
        model = nnx.merge(graphdef, params)
        return (with_adapter(model, lora, trained) if lora else nnx.merge(graphdef, trained)).hidden_states(ids).sum()

    program = jax.make_jaxpr(jax.grad(loss))(trained, params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    return sum(equation.primitive.name == primitive for equation in equations(program.jaxpr))


@pytest.mark.parametrize("remat", [*REMAT_NAMES, "q,k,gate", "save_attention", "save_projections", "save_dots", "none"])
def test_what_is_kept_is_not_computed_again(remat: str):
    kept = ComputeConfig(remat=remat).kept
    saved = count_in_gradient("full", "dot_general") - count_in_gradient(remat, "dot_general")
    assert saved == sum(MATMULS[name] for name in kept)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=("down_proj",))], ids=["whole", "adapter"])
def test_a_gathered_weight_that_is_kept_is_not_gathered_again(lora: LoraConfig | None, mesh_of):
    with jax.set_mesh(mesh_of(1, 2, 1)):
        assert count_in_gradient("full", "reshard", lora) - count_in_gradient("down_proj", "reshard", lora) == 1
