"""Prefill, decoding and its kernel through the real TPU compiler; needs the tpu extra and no TPU."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bc2_jax.aot import compilation, inference
from bc2_jax.aot.program import Program
from bc2_jax.config import ComputeConfig, DataConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.infer import engine
from bc2_jax.infer.cache import init_cache
from bc2_jax.infer.sampling import Sampling
from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.flash_decode import flash_decode
from bc2_jax.sharding import make_mesh, reshard, use_rules
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options

compilation.use_topologies()

ROOT = Path(__file__).parents[2]
TOPOLOGY = parse_topology("v5e:2x4")
REQUEST = inference.Request(batch=32, prompt_length=256, cache_length=4096)
# As in 13B, the feed-forward layer's part of a chip does not fill the tiles, and the cache does not fit VMEM.
CONFIG = TrainConfig(
    name="small",
    model=ModelConfig(
        hidden_size=2048, intermediate_size=8 * 560, num_hidden_layers=3, num_attention_heads=16,
        position_embedding="alibi", vocab_size=4096, model_max_length=4096,
    ),
    compute=ComputeConfig(attention="flash"),
    mesh=inference.whole_slice_mesh(TOPOLOGY),
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=512),
    num_steps=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> inference.CompiledInference:
    return inference.compile_inference(CONFIG, TOPOLOGY, REQUEST, compiler_options("v5e", inference=True))


def test_the_cache_is_cut_by_heads_and_written_in_place(compiled):
    model = CONFIG.model
    heads, kv = model.num_attention_heads // 8, 3 * REQUEST.batch * REQUEST.cache_length * model.hidden_size // 8 * 2
    assert compiled.cache_bytes == 2 * kv
    slots = (3, REQUEST.batch, heads, REQUEST.cache_length, 128)
    for program in (compiled.prefill, compiled.decode):
        parsed = Program(program.hlo, 1)
        caches = [i for i, _, _ in parsed.walk() if any(shape.dims == slots for shape in i.shapes)]
        assert caches
        assert not [i for i in caches if i.opcode.startswith("copy")]
    # A second cache, or weights in another layout, would be temporaries of the loop.
    assert compiled.decode.memory.temporaries < kv // 3
    assert compiled.decode.memory.aliased >= compiled.cache_bytes


def test_weights_are_read_where_they_are(compiled):
    program = Program(compiled.decode.hlo, 1)
    layer = CONFIG.model.hidden_size * CONFIG.model.intermediate_size // 8 * 2
    written = [
        (i.name, shape.bytes) for i, _, count in program.walk() for shape in i.shapes
        if i.opcode in ("fusion", "copy") and shape.in_hbm and shape.bytes == layer and count > 1
    ]  # fmt: skip
    assert written == []


def test_chips_add_up_in_bf16(compiled):
    for program in (compiled.prefill, compiled.decode):
        parsed = Program(program.hlo, 1)
        for instruction, computation, _ in parsed.walk():
            if instruction.opcode.startswith("all-reduce") and instruction.bytes > 2**12:
                sources = [computation.by_name[name] for name in instruction.operands]
                assert {shape.dtype for source in sources for shape in source.shapes} == {"bf16"}, instruction


def test_report(compiled):
    report = inference.make_report(compiled)
    assert report.parameter_bytes == pytest.approx(2 * CONFIG.model.num_parameters() / 8, rel=0.02)
    step = report.decode.estimate
    assert report.floor_seconds < step.seconds < step.seconds_high
    assert step.kernels > 0 and step.matmul < step.matmul_raw
    assert step.collectives["all-reduce"].count == 2 * 3 + 1  # and the embedding
    assert report.decode.warnings == ()
    assert report.decode.memory.arguments == pytest.approx(report.parameter_bytes + report.cache_bytes, rel=0.05)


def test_rows_are_inserted_in_place():
    """Into a batch of 32 a prefill of 2: nothing as large as the cache is made or copied."""
    mesh = make_mesh(CONFIG.mesh, compilation.topology_devices(TOPOLOGY))
    compute = dataclasses.replace(CONFIG.compute, compiler_options="default")

    def state(batch: int, length: int) -> engine.Decoding:
        row, slots = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, length), jnp.int32)
        seen = reshard(jnp.zeros((batch, CONFIG.model.vocab_size), bool), "batch", None)
        sampling = Sampling(None, None, row, row, row, row, row)
        cache = init_cache(CONFIG.model, compute, batch, length)
        return engine.Decoding(cache, seen, slots, None, row, row, row, row.astype(jnp.int8), sampling)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        states = [jax.tree.map(placed, jax.eval_shape(lambda s=size: state(*s))) for size in ((32, 4096), (2, 256))]
        rows = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        compiled = engine.programs(compute).insert.lower(*states, rows, rows).compile()
    memory = compiled.memory_analysis()
    cache = 2 * 3 * 32 * 4096 * CONFIG.model.hidden_size // 8 * 2
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache // 16
    assert inference.copy_warnings(Program(compiled.as_text(), 1)) == []


def test_without_the_kernel():
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(attention="chunked"))
    compiled = inference.compile_inference(config, TOPOLOGY, REQUEST, compiler_options("v5e", inference=True))
    assert "tpu_custom_call" not in compiled.prefill.hlo + compiled.decode.hlo
    assert inference.make_report(compiled).decode.estimate.seconds > 0


@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("N", "S", "H", "dtype"),
    [
        (5, 4096, 128, jnp.bfloat16), (40, 2304, 128, jnp.bfloat16), (2, 64, 64, jnp.bfloat16),
        (3, 256, 128, jnp.float32),
    ],
)  # fmt: skip
def test_the_kernel_compiles(chip: str, N: int, S: int, H: int, dtype):
    device = compilation.topology_devices(parse_topology(chip))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache, heads = placed(2, 2, N, S, H, dtype=dtype), placed(2, N, H, dtype=dtype)
    token, slots = (Tokens(placed(2, length), placed(2, length)) for length in (1, S))
    arguments = (heads, heads, heads, cache, cache, placed(), placed(2), token, slots, placed(N, dtype=jnp.float32))
    compiled = jax.jit(flash_decode, donate_argnums=(3, 4)).lower(*arguments).compile()
    assert "flash_decode" in compiled.as_text()
    # Both caches are written where they are.
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * math.prod(cache.shape) * cache.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_the_tool(tmp_path: Path):
    config = tmp_path / "small.py"
    config.write_text(
        '"""Small."""\nfrom bc2_jax.config import *\ndef config():\n'
        "    return TrainConfig(name='small', num_steps=1, compute=ComputeConfig(attention='flash'),\n"
        "        model=ModelConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=2,\n"
        "        num_attention_heads=4, position_embedding='rope', vocab_size=1024, model_max_length=512),\n"
        "        data=DataConfig(sources=(SourceConfig(path='rows'),), tokenizer='t', sequence_length=512))\n"
    )
    command = [
        sys.executable, "tools/aot_compile.py", str(config), "--topology", "v6e:2x2", "--inference", "--batch", "2",
        "--prompt-length", "128", "--cache-length", "512", "--json", str(tmp_path / "out.json"),
        "--hlo", str(tmp_path / "out.txt"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "compile-time estimate" in done.stdout and "by arithmetic" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["mesh"]["tensor"] == 4 and figures["batch"] == 2
    assert {"floor_seconds", "estimated_seconds", "estimated_tokens_per_second"} <= set(figures["decode"])
    for name in ("prefill", "decode"):
        assert "is_scheduled=true" in (tmp_path / f"out_{name}.txt").read_text()[:2000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inference", "--topology", "v5e:4x4"], "error: mesh.tensor = 16 is not valid: it must divide"),
        (["--inference", "--topology", "v5e:2x4", "--batch-per-chip", "1"], "error: --batch-per-chip is an option of"),
        (["--topology", "v5e:2x4", "--cache-length", "512"], "error: --cache-length is an option of inference"),
        (["--inference", "--topology", "v5e:2x4", "--prompt-length", "100"], "error: prompt_length = 100 is not valid"),
    ],
)
def test_the_tool_refuses(options: list[str], message: str):
    command = [sys.executable, "tools/aot_compile.py", "configs/baichuan2_13b.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
