"""A server's programs and the kernel of decoding through the real TPU compiler; needs the tpu extra and no TPU."""

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

from bc2_jax.aot import compilation, serving
from bc2_jax.aot.inference import abstract_prepared, whole_slice_mesh
from bc2_jax.aot.program import Program
from bc2_jax.aot.report import copy_warnings
from bc2_jax.config import ComputeConfig, DataConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.infer import engine
from bc2_jax.kernels.cached import LANES, KVCache
from bc2_jax.kernels.flash_decode import flash_decode
from bc2_jax.sharding import make_mesh, place_shapes, use_rules
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options

compilation.use_topologies()

ROOT = Path(__file__).parents[2]
TOPOLOGY = parse_topology("v5e:2x4")
SHAPES = serving.ServingShapes(slots=32, slot_length=4096, kv="int8")
# As in 13B, neither the feed-forward layer's nor the heads' part of a chip fills the tiles, and the cache does not fit
# VMEM.
CONFIG = TrainConfig(
    name="small",
    model=ModelConfig(
        hidden_size=3072, intermediate_size=8 * 560, num_hidden_layers=3, num_attention_heads=24,
        position_embedding="alibi", vocab_size=4096, model_max_length=4096,
    ),
    compute=ComputeConfig(attention="flash"),
    mesh=whole_slice_mesh(TOPOLOGY),
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=512),
    num_steps=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> serving.CompiledServing:
    return serving.compile_serving(CONFIG, TOPOLOGY, SHAPES, compiler_options("v5e", inference=True))


def test_the_cache_is_cut_by_heads_and_written_in_place(compiled):
    model, programs = CONFIG.model, compiled.engine
    kv = 3 * 32 * 4096 * model.hidden_size // 8
    assert programs.cache_bytes == 2 * kv * (1 + 4 / 128)
    rows = (3, 32, model.num_attention_heads // 8)
    slots = ((*rows, 4096, 128), (*rows, 32, 128))
    for program in (programs.extend, programs.decode):
        parsed = Program(program.hlo, 1)
        caches = [i for i, _, _ in parsed.walk() if any(shape.dims in slots for shape in i.shapes)]
        assert caches
        # What is small is taken to VMEM ahead of its use.
        assert not [i for i in caches if i.opcode in ("copy", "copy-start") and all(x.in_hbm for x in i.shapes[:2])]
        # A second cache, or weights in another layout, would be temporaries.
        assert program.memory.temporaries < kv // 3
        assert program.memory.aliased >= programs.cache_bytes
    assert programs.allocate.memory.temporaries < kv // 3


def test_weights_are_read_where_they_are(compiled):
    program = Program(compiled.engine.decode.hlo, 1)
    layer = CONFIG.model.hidden_size * CONFIG.model.intermediate_size // 8 * 2
    written = [
        (i.name, shape.bytes) for i, _, count in program.walk() for shape in i.shapes
        if i.opcode in ("fusion", "copy") and shape.in_hbm and shape.bytes == layer and count > 1
    ]  # fmt: skip
    assert written == []


def test_chips_add_up_in_bf16(compiled):
    for program in (compiled.engine.extend, compiled.engine.decode):
        parsed = Program(program.hlo, 1)
        for instruction, computation, _ in parsed.walk():
            is_hidden = any(CONFIG.model.hidden_size in shape.dims for shape in instruction.shapes)
            if instruction.opcode.startswith("all-reduce") and is_hidden:
                sources = [computation.by_name[name] for name in instruction.operands]
                assert {shape.dtype for source in sources for shape in source.shapes} == {"bf16"}, instruction


def test_each_device_draws_for_its_own_rows(compiled):
    """4 of 32: no array has the whole vocabulary of all rows."""
    whole = (32, CONFIG.model.vocab_size)
    parsed = Program(compiled.engine.decode.hlo, 1)
    assert not [i for i, _, _ in parsed.walk() if any(sorted(shape.dims) == sorted(whole) for shape in i.shapes)]
    assert "all-to-all" in serving.make_report(compiled).decode.estimate.collectives


def test_report(compiled):
    report = serving.make_report(compiled)
    assert report.parameter_bytes == pytest.approx(2 * CONFIG.model.num_parameters() / 8, rel=0.02)
    step = report.decode.estimate
    assert report.floor_seconds < step.seconds < step.seconds_high
    assert report.single_floor_seconds < report.single_seconds < step.seconds / 2
    assert step.kernels > 0 and step.matmul < step.matmul_raw
    added = [
        count for i, _, count in Program(compiled.engine.decode.hlo, 1).walk()
        if i.opcode.startswith("all-reduce") and any(CONFIG.model.hidden_size in shape.dims for shape in i.shapes)
    ]  # fmt: skip
    assert sum(added) == 2 * 3 + 1  # and the embedding
    assert report.rare_seconds > 0 and report.key_seconds > 0
    assert report.extend.warnings == report.decode.warnings == ()
    assert report.decode.memory.arguments == pytest.approx(report.parameter_bytes + report.state_bytes, rel=0.01)


def test_slots_are_copied_in_place():
    """A row to another: nothing as large as the cache is made or copied."""
    mesh = make_mesh(CONFIG.mesh, compilation.topology_devices(TOPOLOGY))
    compute = dataclasses.replace(CONFIG.compute, compiler_options="default")
    prepared = abstract_prepared(CONFIG.model, compute, mesh, "compute")
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        programs = engine.programs(compute)
        state = place_shapes(
            mesh, jax.eval_shape(lambda p: programs.allocate(p, serving.settings_of(32), slots=4096), prepared)
        )
        number = place_shapes(mesh, jax.ShapeDtypeStruct((), jnp.int32))
        compiled = programs.copy_slots.lower(state, number, number, number, size=256).compile()
    memory = compiled.memory_analysis()
    cache = 2 * 3 * 32 * 4096 * CONFIG.model.hidden_size // 8 * 2
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache // 16
    assert copy_warnings(Program(compiled.as_text(), 1)) == []


def test_without_the_kernel():
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(attention="chunked"))
    shapes = dataclasses.replace(SHAPES, kv="compute")
    compiled = serving.compile_serving(config, TOPOLOGY, shapes, compiler_options("v5e", inference=True))
    assert "tpu_custom_call" not in compiled.engine.extend.hlo + compiled.engine.decode.hlo
    assert serving.make_report(compiled).decode.estimate.seconds > 0


@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("N", "S", "H", "dtype"),
    [
        (5, 4096, 128, jnp.bfloat16), (40, 2304, 128, jnp.bfloat16), (2, 128, 64, jnp.bfloat16),
        (3, 256, 128, jnp.float32), (5, 4096, 128, jnp.int8), (8, 2304, 128, jnp.int8), (2, 128, 128, jnp.int8),
    ],
)  # fmt: skip
def test_the_kernel_compiles(chip: str, N: int, S: int, H: int, dtype):
    device = compilation.topology_devices(parse_topology(chip))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    slots, scales = placed(2, 2, N, S, H, dtype=dtype), None
    heads = placed(2, N, H, dtype=jnp.bfloat16 if dtype == jnp.int8 else dtype)
    if dtype == jnp.int8:
        scales = placed(2, 2, N, S // LANES, LANES, dtype=jnp.float32)
    cache, slopes = KVCache(slots, slots, scales, scales), placed(2, N, dtype=jnp.float32)
    compiled = jax.jit(flash_decode, donate_argnums=3).lower(heads, heads, heads, cache, placed(), placed(2), slopes)
    compiled = compiled.compile()
    assert "flash_decode" in compiled.as_text()
    # The cache is written where it is.
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in cache if x is not None)
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22


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
        sys.executable, "tools/aot_compile.py", str(config), "--topology", "v6e:2x2", "--serve", "--slots", "2",
        "--prompt-length", "128", "--slot-length", "512", "--json", str(tmp_path / "out.json"),
        "--hlo", str(tmp_path / "out.txt"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "compile-time estimate" in done.stdout and "one sequence" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["mesh"]["tensor"] == 4 and figures["slots"] == 2
    assert {"floor_seconds", "estimated_seconds", "estimated_tokens_per_second"} <= set(figures["decode"])
    for name in ("extend", "decode"):
        assert "is_scheduled=true" in (tmp_path / f"out_{name}.txt").read_text()[:2000]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serve", "--topology", "v5e:4x4"], "error: mesh.tensor = 16 is not valid: it must divide"),
        (["--serve", "--topology", "v5e:2x4", "--batch-per-chip", "1"], "error: --batch-per-chip is an option of"),
        (["--topology", "v5e:2x4", "--slot-length", "512"], "error: --slot-length is an option of serving"),
        (["--serve", "--topology", "v5e:2x4", "--slot-length", "100"], "error: slot_length = 100 is not valid"),
    ],
)
def test_the_tool_refuses(options: list[str], message: str):
    command = [sys.executable, "tools/aot_compile.py", "configs/baichuan2_13b.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
