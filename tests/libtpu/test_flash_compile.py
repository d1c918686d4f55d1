"""The flash attention kernels through the real TPU compiler, for chips that are not there. Needs the tpu extra."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.flash import flash_attention, rotates
from bc2_jax.model.position import make_rope
from bc2_jax.sharding import current_chip

# libtpu asks the cloud what machine this is, and allows one process at a time, unless told otherwise.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CASES = [
    (1, 4096, 2, 128, jnp.bfloat16),
    (2, 1100, 2, 64, jnp.bfloat16),
    (1, 128, 2, 128, jnp.bfloat16),
    (1, 32768, 2, 128, jnp.bfloat16),
    (1, 512, 2, 128, jnp.float32),
]


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "rope"])
@pytest.mark.parametrize(("B", "T", "N", "H", "dtype"), CASES)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_with_gradients(chip: str, B: int, T: int, N: int, H: int, dtype, alibi: bool):
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    mesh = jax.sharding.Mesh(devices[:1], ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(q, k, v, tokens, slopes):
        assert current_chip() == chip
        rope = make_rope(tokens.positions, H, 10_000.0) if rotates(T, H) and not alibi else None
        return jnp.sum(flash_attention(q, k, v, tokens, slopes if alibi else None, rope=rope).astype(jnp.float32))

    x, tokens = placed((B, T, N, H), dtype), Tokens(*[placed((B, T), jnp.int32)] * 2)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, tokens, placed((N,), jnp.float32))
    text = lowered.compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text
