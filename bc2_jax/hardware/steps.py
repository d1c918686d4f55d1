"""Training and decoding steps of a model that fits, timed and profiled, beside the estimate of the same program."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.aot.compilation import compile_program, device_coordinates
from bc2_jax.aot.estimate import Estimate, estimate_step
from bc2_jax.aot.inference import inference_compute
from bc2_jax.aot.program import Program
from bc2_jax.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.config.model import BAICHUAN2_7B
from bc2_jax.data.batch import make_put
from bc2_jax.hardware.device import Device, topology_of
from bc2_jax.hardware.profile import CLASSES, split, trace
from bc2_jax.hardware.results import Line, Outcome
from bc2_jax.hardware.timing import seconds_of_calls
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import STEPS, Decoding, Reason
from bc2_jax.infer.sampling import RARE
from bc2_jax.infer.settings import Settings, sampling_of
from bc2_jax.model.baichuan import init_params, split_model
from bc2_jax.sharding import from_host, make_mesh, use_rules
from bc2_jax.tpu.options import compiler_options
from bc2_jax.train.job import init_state, lower_train_step
from bc2_jax.train.pretrain import make_step
from bc2_jax.train.start import tuned_options

_BYTES_PER_PARAMETER = 16  # fp32 weights, two moments and gradients
_MEMORY_SHARE = 0.7  # for these; the rest for activations
_MOST_LAYERS = 8
_PROFILED = 2
_NO_ESTIMATE = "an estimate needs the scheduled program of a known TPU"
CORRECTS = {
    "matmul": "rates.matmul_share, if it is measured below 1; else the compiler's cycles of matmul fusions are wrong",
    "vector": "rates.hbm_share, if the copy above differs too; else the compiler's cycles of other fusions are wrong",
    "kernels": "rates.attention_forward_share and rates.attention_backward_share",
    "exposed": "rates.link_bandwidth, if the collectives above differ too; else less overlaps than the schedule says",
}


class Sizes(NamedTuple):
    """A model and its batch, chosen by the memory of the devices."""

    model: ModelConfig
    rows: int  # of a training batch, for each device
    length: int  # tokens of a row
    decoding_rows: int
    slots: int


def choose_sizes(device: Device) -> Sizes:
    """Layers of the 7B model, or of half its width, as many as fit with a vocabulary of 32k; on a CPU a tiny model."""
    if device.is_small:
        tiny = dataclasses.replace(
            BAICHUAN2_7B, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=256, model_max_length=128,
        )  # fmt: skip
        return Sizes(tiny, 1, 64, 2, 128)
    budget = _MEMORY_SHARE * device.memory_bytes * device.count / _BYTES_PER_PARAMETER
    for width in (1, 2):
        one = dataclasses.replace(
            BAICHUAN2_7B, vocab_size=32_768, num_hidden_layers=1, hidden_size=BAICHUAN2_7B.hidden_size // width,
            intermediate_size=BAICHUAN2_7B.intermediate_size // width,
            num_attention_heads=BAICHUAN2_7B.num_attention_heads // width,
        )  # fmt: skip
        two = dataclasses.replace(one, num_hidden_layers=2)
        layers = 1 + int((budget - one.num_parameters()) / (two.num_parameters() - one.num_parameters()))
        if layers >= 2 or width == 2:
            break
    model = dataclasses.replace(one, num_hidden_layers=min(max(layers, 1), _MOST_LAYERS))
    return Sizes(model, 1 if device.memory_bytes < 24e9 else 4, 4096, 16, 2048)


class Compiled(NamedTuple):
    run: Callable[..., Any]
    hlo: str | None  # the scheduled program, on a TPU
    note: str = ""


def compile_here(name: str, lower: Callable[[], Any], options: dict[str, Any], device: Device) -> Compiled:
    """Compiles for the devices of this process, on a TPU with the text that the estimate reads."""
    if device.platform != "tpu":
        return Compiled(lower().compile(), None, _NO_ESTIMATE)
    try:
        program = compile_program(name, lower, options)
    except RuntimeError as error:
        if "The compiler wrote no" not in str(error):
            raise
        return Compiled(lower().compile(compiler_options=options), None, str(error))
    return Compiled(program.executable, program.hlo)


def estimate_here(program: Program | None, mesh: Mesh, device: Device, decodes: bool = False) -> Estimate | None:
    """The estimate of a program on this mesh; None without the program or for an unknown chip or slice."""
    if program is None or device.chip is None:
        return None
    topology = topology_of(device.chip, list(mesh.devices.flat))
    if topology is None:
        return None
    without = RARE if decodes else ""
    return estimate_step(program, topology, device_coordinates(mesh), streams_weights=decodes, without=without)


def compare(name: str, measured: float, parts: dict[str, float], estimate: Estimate | None) -> tuple[Line, ...]:
    """A line for the step and one for each class of its time; `parts` is empty if the profile shows none."""
    total = Line(name, "s", measured, estimate.seconds if estimate else None, "see its parts")
    lines = [total]
    for kind in CLASSES:
        if parts and (parts[kind] or (estimate and getattr(estimate, kind))):
            value = getattr(estimate, kind) if estimate else None
            lines.append(Line(f"{name}: {kind}", "s", parts[kind], value, CORRECTS[kind]))
    if parts:
        lines.append(Line(f"{name}: device idle", "s", max(measured - sum(parts.values()), 0.0)))
    return tuple(lines)


# ------------------------------------------------------------------------------------------------------------ training


def training_config(device: Device, sizes: Sizes) -> TrainConfig:
    kernel = "chunked" if device.is_small else "flash"
    return TrainConfig(
        name="check_hardware", model=sizes.model, num_steps=1, mesh=MeshConfig(),
        data=DataConfig(
            sources=(SourceConfig(path="none"),), tokenizer="none", sequence_length=sizes.length,
            global_batch_size=sizes.rows * device.count,
        ),
        compute=ComputeConfig(attention=kernel, remat="none" if device.is_small else "save_dots"),  # type: ignore[arg-type]  # one of its literals
    )  # fmt: skip


def measure_training(device: Device) -> Outcome:
    """The ordinary step of pre-training over all devices, on random tokens, synchronised."""
    sizes = choose_sizes(device)
    config = training_config(device, sizes).resolve(device.count)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = make_step(config, mesh)
        lower = functools.partial(
            lower_train_step, parts.objective, parts.optimizer, parts.state, parts.frozen, parts.batch
        )
        compiled = compile_here("step", lower, tuned_options(config, mesh) or {}, device)
        state = init_state(init_params(config.model, 0, mesh), parts.optimizer)
        batch = make_put(config.data, mesh)(random_rows(config))
        losses = []

        def step() -> Any:
            nonlocal state
            state, metrics = compiled.run(state, {}, batch)
            losses.append(metrics["loss"])
            return metrics

        step()
        taken = seconds_of_calls(step)
        events = trace(step, _PROFILED)
    program = Program(compiled.hlo) if compiled.hlo else None
    found = split(events, _PROFILED, jax.local_device_count(), program)
    median = statistics.median(taken)
    model, values = config.model, [float(loss) for loss in losses]
    details: dict[str, Any] = {
        "model": dataclasses.asdict(model), "parameters": model.num_parameters(), "seconds_of_steps": taken,
        "tokens_per_second_per_device": sizes.rows * sizes.length / median, "losses": values,
    }  # fmt: skip
    if device.peak_flops:
        details["mfu"] = parts.flops_per_step / device.count / median / device.peak_flops
    if not all(map(math.isfinite, values)) or values[-1] >= values[0]:
        return Outcome(
            "wrong", f"the loss does not fall on a repeated batch: {values[0]:.3f} to {values[-1]:.3f}", details=details
        )
    text = f"{model.num_hidden_layers} layers of {model.hidden_size}, {sizes.rows} x {sizes.length} tokens a device, "
    text += f"{details['tokens_per_second_per_device']:,.0f} tokens/s a device"
    text += f", MFU {details['mfu']:.3f}" if "mfu" in details else ""
    lines = compare("training step", median, found if events else {}, estimate_here(program, mesh, device))
    return Outcome("measured", text + (f"; {compiled.note}" if compiled.note else ""), lines, details=details)


def random_rows(config: TrainConfig) -> dict[str, np.ndarray]:
    """This process's rows of a batch, one document each."""
    shape = (config.data.global_batch_size // jax.process_count(), config.data.sequence_length)
    rng = np.random.default_rng(jax.process_index())
    tokens = rng.integers(3, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    return {
        "input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ decoding


def measure_decoding(device: Device) -> Outcome:
    """One token for each row of a batch with an almost full cache, tensor-parallel over the devices."""
    sizes = choose_sizes(device)
    model, rows = sizes.model, sizes.decoding_rows
    tensor = math.gcd(model.num_attention_heads, device.count)
    mesh = make_mesh(MeshConfig(data=device.count // tensor, fsdp=1, tensor=tensor))
    compute = inference_compute(training_config(device, sizes).compute)
    rows *= device.count // tensor
    options = dict(compiler_options(device.chip.name, inference=True)) if device.chip else {}
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        graphdef = split_model(model, compute)[0]
        prepared = engine.prepare(nnx.merge(graphdef, init_params(model, 0, mesh)), donate=True)
        greedy = Settings(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, eos_token_id=()).check(model)
        sampling = sampling_of([greedy] * rows, range(rows))
        decoding = engine.allocate(prepared, sampling, slots=sizes.slots)
        steps, cancel = from_host((np.int32(STEPS), np.zeros(rows, bool)))
        lower = functools.partial(engine.programs(compute).decode.lower, prepared, decoding, steps, cancel)
        compiled = compile_here("decoding loop", lower, options, device)

        def decode() -> Any:
            nonlocal decoding
            decoding, emitted = compiled.run(prepared, almost_full(decoding, sizes.slots), steps, cancel)
            return emitted

        emitted = decode()
        taken = seconds_of_calls(decode)
        events = trace(decode, _PROFILED)
    if int((np.asarray(emitted.tokens_BK) >= 0).sum()) != rows * STEPS:
        return Outcome("wrong", f"not every one of {rows} rows decoded {STEPS} tokens")
    program = Program(compiled.hlo, open_trips=1) if compiled.hlo else None
    found = split(events, _PROFILED * STEPS, jax.local_device_count(), program)
    median = statistics.median(taken) / STEPS
    text = f"{rows} rows of {sizes.slots} slots, {rows / median:,.0f} tokens/s on all devices"
    lines = compare(
        "decoding step", median, found if events else {}, estimate_here(program, mesh, device, decodes=True)
    )
    details = {"seconds_of_calls": taken, "tokens_per_call": rows * STEPS}
    return Outcome("measured", text + (f"; {compiled.note}" if compiled.note else ""), lines, details=details)


def almost_full(decoding: Decoding, slots: int) -> Decoding:
    """Every row running, with room for the tokens of one call; a full cache is what the estimate assumes."""
    return decoding._replace(
        length_B=jnp.full_like(decoding.length_B, slots - STEPS),
        reason_B=jnp.full_like(decoding.reason_B, Reason.RUNNING),
        step_B=jnp.ones_like(decoding.step_B),
        token_B=jnp.full_like(decoding.token_B, 3),
    )
