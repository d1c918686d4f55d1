"""What a device reaches: matmuls of the model's shapes, memory, attention kernels, host memory, links.

Each is beside the constant that the estimate uses (`tpu.rates.default_rates`), and most give a new value for it.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bc2_jax.aot.estimate import Links
from bc2_jax.aot.program import Collective
from bc2_jax.config.model import BAICHUAN2_7B, BAICHUAN2_13B
from bc2_jax.hardware.device import Device, topology_of
from bc2_jax.hardware.results import Line, Outcome
from bc2_jax.hardware.timing import seconds_of_calls, seconds_per_pass
from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.blocks import choose_blocks
from bc2_jax.kernels.cudnn import cudnn_attention
from bc2_jax.kernels.flash import flash_attention
from bc2_jax.sharding import current_chip
from bc2_jax.tpu.chips import GIB, Topology
from bc2_jax.tpu.rates import ATTENTION_HEAD_DIM, default_rates

_MIB = 2**20


def _least(device: Device) -> float:
    """Seconds of a measured loop."""
    return 0.02 if device.is_small else 0.3


# ------------------------------------------------------------------------------------------------------------- matmuls


def measure_matmuls(device: Device) -> Outcome:
    """bf16 matmuls with fp32 sums, [tokens, D] x [D, F] and back, of both released models; TFLOP/s."""
    models = {"7B": BAICHUAN2_7B, "13B": BAICHUAN2_13B}
    tokens, shapes = 8192, {name: (m.hidden_size, m.intermediate_size) for name, m in models.items()}
    if device.is_small:
        tokens, shapes = 64, {"small": (64, 128)}
    lines, best = [], 0.0
    peak = device.peak_flops
    share = default_rates(device.chip).matmul_share if device.chip else 1.0
    for name, (D, F) in shapes.items():
        x, up, down = (_normal(shape) for shape in ((tokens, D), (D, F), (F, D)))

        def multiply(x: Array, up: Array, down: Array) -> Array:
            y = jnp.dot(x, up, preferred_element_type=jnp.float32).astype(x.dtype)
            return jnp.dot(y, down, preferred_element_type=jnp.float32).astype(x.dtype)

        flops = 4 * tokens * D * F / seconds_per_pass(multiply, x, up, down, least=_least(device))
        best = max(best, flops)
        estimated = None if peak is None else peak * share / 1e12
        what = "rates.matmul_share: no matmul of a step counts as faster"
        lines.append(Line(f"matmul {name} [{tokens}, {D}] x [{D}, {F}]", "TFLOP/s", flops / 1e12, estimated, what))
    return Outcome(
        "measured", lines=tuple(lines), rates={} if peak is None else {"matmul_share": min(best / peak, 1.0)}
    )


def _normal(shape: tuple[int, int]) -> Array:
    """bf16 that keeps the size of what it multiplies."""
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * shape[0] ** -0.5)(jax.random.key(0))


# -------------------------------------------------------------------------------------------------------------- memory


def measure_memory(device: Device) -> Outcome:
    """GB/s of a streaming read and write of an array that no on-chip memory holds."""
    size = min(device.memory_bytes // 8, 2 * GIB) if not device.is_small else 8 * _MIB
    x = jnp.zeros(size // 4, jnp.float32)
    rate = 2 * x.nbytes / seconds_per_pass(lambda x: x + 1, x, least=_least(device))
    peak = device.hbm_bandwidth
    share = default_rates(device.chip).hbm_share if device.chip else None
    estimated = None if peak is None or share is None else peak * share / 1e9
    what = "rates.hbm_share: the bandwidth of streaming fusions and kernels"
    line = Line(f"memory, {size // _MIB} MiB read and written", "GB/s", rate / 1e9, estimated, what)
    return Outcome("measured", lines=(line,), rates={} if peak is None else {"hbm_share": min(rate / peak, 1.0)})


def measure_host(device: Device) -> Outcome:
    """GB/s between a device and pinned host memory, each way."""
    local = jax.local_devices()[0]
    kinds = {memory.kind for memory in local.addressable_memories()}
    if "pinned_host" not in kinds:
        return Outcome("skipped", f"JAX offers no pinned_host memory here, only {', '.join(sorted(kinds))}")
    size = 4 * _MIB if device.is_small else 512 * _MIB
    here = jax.sharding.SingleDeviceSharding(local)
    there = here.with_memory_kind("pinned_host")
    on_device = jax.device_put(jnp.zeros(size // 4, jnp.float32), here)
    on_host = jax.block_until_ready(jax.device_put(on_device, there))
    lines, rates = [], []
    estimated = default_rates(device.chip).host_bandwidth / 1e9 if device.chip else None
    for name, x, target in (("to the host", on_device, there), ("from the host", on_host, here)):
        rates.append(size / statistics.median(seconds_of_calls(functools.partial(jax.device_put, x, target))))
        what = "rates.host_bandwidth: remat policy offload"
        lines.append(Line(f"{name}, {size // _MIB} MiB", "GB/s", rates[-1] / 1e9, estimated, what))
    return Outcome("measured", lines=tuple(lines), rates={"host_bandwidth": min(rates)})


# ----------------------------------------------------------------------------------------------------------- attention


def measure_attention(device: Device) -> Outcome:
    """Share of peak of the attention kernels for rows of 4096 tokens and heads of 128, forward and backward."""
    if device.platform == "cpu":
        return Outcome("skipped", "interpreted kernels are not timed")
    B, T, N, H = 1, 4096, 16, ATTENTION_HEAD_DIM
    tokens = Tokens(jnp.arange(T, dtype=jnp.int32)[None], jnp.ones((B, T), jnp.int32))
    q, k, v = (_normal((T, N * H)).reshape(B, T, N, H) for _ in "qkv")
    kernel = cudnn_attention if device.platform == "gpu" else flash_attention

    def attend(q: Array, k: Array, v: Array) -> Array:
        return kernel(q, k, v, tokens, None)

    def both(q: Array, k: Array, v: Array) -> Array:
        out, pull = jax.vjp(attend, q, k, v)
        dq, dk, dv = pull(out)
        return q + 1e-3 * (dq + dk + dv)

    forward = seconds_per_pass(attend, q, k, v)
    backward = seconds_per_pass(both, q, k, v) - forward
    blocks = choose_blocks(current_chip(), H, T).fit(T, 128)
    rates, lines = {}, []
    default = default_rates(device.chip) if device.chip else None
    # The kernels count whole blocks, as the estimate does.
    parts = (("forward", forward, 4, blocks.forward), ("backward", backward, 10, blocks.backward))
    for name, seconds, factor, block in parts:
        count = T // block
        flops = factor * B * N * H * count * (count + 1) / 2 * block**2 / seconds
        field = f"attention_{name}_share"
        estimated = None
        if default is not None and device.peak_flops is not None:
            estimated = device.peak_flops * getattr(default, field) / 1e12
            rates[field] = min(flops / device.peak_flops, 1.0)
        lines.append(
            Line(
                f"attention {name}, {N} heads of {H}, {T} tokens", "TFLOP/s", flops / 1e12, estimated, f"rates.{field}"
            )
        )
    return Outcome("measured", lines=tuple(lines), rates=rates)


# --------------------------------------------------------------------------------------------------------- collectives


def measure_collectives(device: Device) -> Outcome:
    """Gathers, scatters, reductions and exchanges along each side of the slice, and over all devices; GB/s.

    A rate is the bytes of the whole tensor over the time, as `aot.estimate.Links` counts them.
    """
    if jax.device_count() == 1:
        return Outcome("skipped", "there is one device")
    grid, topology = _arrange(device)
    names: tuple[str, ...] = tuple(f"side{i}" for i in range(grid.ndim))
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    links = None
    if topology is not None:
        coordinates = [(getattr(d, "slice_index", 0) or 0, *d.coords) for d in grid.flat]
        links = Links(topology, coordinates, default_rates(topology.chip))
    groups: list[tuple[str, ...]] = [(name,) for name in names if mesh.shape[name] > 1]
    groups += [names] if len(groups) > 1 else []
    lines, bandwidths = [], []
    for group in groups:
        where = " x ".join(str(mesh.shape[name]) for name in group)
        for kind, seconds, size in _time_group(device, mesh, group):
            estimated = None
            if links is not None:
                expected = links.seconds(Collective(kind, size, "f32", _members(mesh, group), ""))
                estimated = size / expected / 1e9
                if kind in ("all-gather", "reduce-scatter"):
                    bandwidths.append(links.rates.link_bandwidth * expected / seconds)
            name = f"{kind} over {where} devices, {size // _MIB} MiB"
            what = "rates.link_bandwidth, if gathers and scatters agree on it"
            lines.append(Line(name, "GB/s", size / seconds / 1e9, estimated, what))
    rates = {"link_bandwidth": float(np.median(bandwidths))} if bandwidths else {}
    return Outcome("measured", lines=tuple(lines), rates=rates)


def _arrange(device: Device) -> tuple[np.ndarray, Topology | None]:
    """All devices in the shape of their slice, with the slice; in a row if that is unknown or there are several."""
    devices = jax.devices()
    topology = topology_of(device.chip, devices) if device.chip else None
    if topology is None or topology.chip.devices > 1 or topology.num_slices > 1:
        return np.array(devices), topology
    grid = np.empty(topology.shape, object)
    for one in devices:
        grid[tuple(one.coords)[: grid.ndim]] = one
    return grid, topology


def _members(mesh: Mesh, group: tuple[str, ...]) -> tuple[int, ...]:
    """The first group of devices, by their place in the mesh."""
    order = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    index = tuple(slice(None) if name in group else 0 for name in mesh.axis_names)
    return tuple(int(i) for i in order[index].flat)


def _time_group(device: Device, mesh: Mesh, group: tuple[str, ...]) -> list[tuple[str, float, int]]:
    """(kind, seconds, bytes of the whole tensor) of each collective over these axes of the mesh."""
    n = math.prod(mesh.shape[name] for name in group)
    part = (_MIB if device.is_small else 64 * _MIB) // 4 // n
    bodies: dict[str, Callable[[Array], Array]] = {
        # Sums of what was gathered: a slice of it would let the compiler leave the gather out.
        "all-gather": lambda x: jax.lax.all_gather(x, group, tiled=True).reshape(n, part).sum(0) / n,
        "reduce-scatter": lambda x: (
            jax.lax.psum_scatter((x[None] * jnp.arange(1.0, n + 1)[:, None]).reshape(-1), group, tiled=True) / n**2
        ),
        "all-reduce": lambda x: jax.lax.psum(x, group) / n,
        "all-to-all": lambda x: jax.lax.all_to_all(x, group, 0, 0, tiled=True),
    }
    found = []
    for kind, body in bodies.items():
        size = part if kind in ("all-gather", "reduce-scatter") else n * part
        axes = PartitionSpec(mesh.axis_names)
        run = jax.shard_map(body, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
        x = jax.jit(
            lambda size=size: jnp.ones(size * mesh.size, jnp.float32), out_shardings=NamedSharding(mesh, axes)
        )()
        found.append((kind, seconds_per_pass(run, x, least=_least(device)), 4 * n * part))
    return found
