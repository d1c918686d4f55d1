"""A step of a quantized model through the real TPU compiler: weights are read in few bits, where they are."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bc2_jax.aot import compilation
from bc2_jax.aot.program import Program
from bc2_jax.config import ComputeConfig, MeshConfig, ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import init_cache
from bc2_jax.infer.prepared import Prepared, prepare
from bc2_jax.kernels.cached import Place
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.sharding import make_mesh, place_shapes, use_rules
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options

compilation.use_topologies()

# As in 13B, the feed-forward layer's part of a chip is not a multiple of 128.
MODEL = ModelConfig(
    hidden_size=2048, intermediate_size=8 * 560, num_hidden_layers=3, num_attention_heads=16,
    position_embedding="alibi", vocab_size=4096, model_max_length=1024,
)  # fmt: skip
COMPUTE = ComputeConfig(attention="flash", remat="none")
BITS = {"int8": 8, "int4": 4}


@functools.cache
def chips(name: str) -> jax.sharding.Mesh:
    devices = compilation.topology_devices(parse_topology(name))
    return make_mesh(MeshConfig(fsdp=1, tensor=len(devices)), devices)


def run(prepared: Prepared, ids: jax.Array, place: Place, cache):
    model = prepared.merge()
    h_RTD, cache = model.extend(ids, place, cache)
    return model.lm_head(h_RTD[:, -1:]), cache


@pytest.mark.parametrize(
    ("scheme", "topology", "rows", "tokens"),
    [("int8", "v5e:2x4", 8, 1), ("int4", "v5e:2x4", 8, 1), ("int4", "v5e:2x4", 1, 256), ("int8", "v6e:2x2", 64, 1)],
)
def test_a_step_reads_few_bits_and_makes_no_wide_weights(scheme, topology, rows, tokens):
    mesh = chips(topology)
    options = compiler_options(topology.split(":")[0], inference=True)
    place_on = functools.partial(place_shapes, mesh)
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        graphdef, stored = split_model(MODEL, COMPUTE)[0], abstract_params(MODEL, mesh, "bfloat16")
        prepared = place_on(jax.eval_shape(lambda p: prepare(nnx.merge(graphdef, p), quantize=scheme), stored))
        cache = place_on(jax.eval_shape(lambda: init_cache(MODEL, COMPUTE, rows, 1024, "compute")))
        ids, numbers = (place_on(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in ((rows, tokens), (rows,)))
        lower = functools.partial(jax.jit(run, donate_argnums=3).lower, prepared, ids, Place(numbers, numbers), cache)
        compiled = compilation.compile_program("step", lower, options)
    parts, D, F = mesh.size, MODEL.hidden_size, MODEL.intermediate_size
    weights = MODEL.num_hidden_layers * (4 * D * D + 3 * D * F) // parts
    tables = MODEL.vocab_size * D * (2 + 1) // parts  # embedding in bf16, head in int8
    caches = 2 * MODEL.num_hidden_layers * rows * 1024 * D * 2 // parts
    # Scales, and what fills the tiles of a chip's part of F (560 or 1,120) and the last group of a part.
    assert weights * BITS[scheme] // 8 < compiled.memory.arguments - tables - caches < 1.2 * weights * BITS[scheme] // 8
    one = D * F // parts  # elements of the largest weight of a layer
    assert compiled.memory.temporaries < min(2 * one, 3 * 2**20) + 4 * rows * tokens * D
    program = Program(compiled.hlo, parts)
    for instruction, _, _ in program.walk():
        for shape in instruction.shapes if instruction.opcode in ("copy", "convert", "fusion") else ():
            assert not shape.in_hbm or shape.dtype not in ("bf16", "f32") or math.prod(shape.dims) < one, instruction
