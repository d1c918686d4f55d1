"""Every attention kernel of this platform against the plain reference on the same device, forward and backward.

The Pallas kernels run on a TPU, and interpreted on a CPU; on a GPU the path through cuDNN is checked. References are in
fp32 with exact matmuls. Errors are the largest difference over the largest entry of the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.hardware.device import Device
from bc2_jax.hardware.results import Outcome
from bc2_jax.kernels.attention import Tokens, reference_attention
from bc2_jax.kernels.blocks import BlockSizes
from bc2_jax.kernels.cached import LANES, KVCache, Place, cached_attention, quantize_tokens
from bc2_jax.kernels.cudnn import cudnn_attention
from bc2_jax.kernels.flash import flash_attention
from bc2_jax.kernels.flash_decode import flash_decode
from bc2_jax.kernels.segments import TRUNK_BITS, positions_of
from bc2_jax.model.position import alibi_slopes

TOLERANCES = {"float32": 2e-4, "bfloat16": 2e-2}
"""Largest relative error by dtype: fp32 sums in another order, by hardware that multiplies fp32 in parts; bf16 weights
of the softmax and results."""


class Case(NamedTuple):
    """One computation by a kernel and by the reference."""

    name: str
    dtype: str
    run: Callable[[], tuple[dict[str, Array], dict[str, Array]]]
    """() -> results of the kernel and of the reference, by name."""


class Shape(NamedTuple):
    B: int
    T: int
    N: int
    H: int


def check_kernels(device: Device, has_time: Callable[[], bool] = lambda: True) -> Outcome:
    """Runs all cases while `has_time()`. "wrong" if one is out of its tolerance, not finite, or raises an exception."""
    errors: dict[str, Any] = {}
    wrong, cases, skipped = [], list_cases(device), 0
    for case in cases:
        if not has_time():
            skipped += 1
            continue
        try:
            found = {name: relative_error(*pair) for name, pair in pairs(*case.run()).items()}
        except Exception as error:  # whatever a kernel raises on new hardware is a result, and the others are checked
            errors[case.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            wrong.append(f"{case.name} raises {errors[case.name]}")
            continue
        errors[case.name] = found
        limit = TOLERANCES[case.dtype]
        wrong += [
            f"{case.name}: {name} is off by {e:.1e} (limit {limit:.0e})" for name, e in found.items() if not e <= limit
        ]
    details = {"errors": errors, "tolerances": TOLERANCES, "skipped_cases": skipped}
    if wrong:
        return Outcome("wrong", "; ".join(wrong), details=details)
    if skipped == len(cases):
        return Outcome("skipped", "no time was left", details=details)
    largest = max(max(found.values()) for found in errors.values())
    how = "interpreted" if device.is_small else "on the device"
    text = f"{len(errors)} cases {how}, largest error {largest:.1e}"
    return Outcome("passed", text + (f"; {skipped} cases skipped for lack of time" if skipped else ""), details=details)


def list_cases(device: Device) -> list[Case]:
    """Attention over whole rows, and over a cache where the platform has a kernel for it."""
    if device.platform == "gpu":
        shape = Shape(2, 510, 2, 64)
        return [_rows("cudnn", shape, "bfloat16", *case) for case in itertools.product(_ROWS, (False, True))]
    if device.is_small:  # each case takes seconds to interpret
        rows, cache = Shape(1, 45, 2, 16), Shape(3, 256, 2, 16)
        chosen = [_rows("flash", rows, "float32", _documents, True, True)]
        chosen += [_rows("flash", rows, "bfloat16", _one_document, False, True)]
        return [*chosen, _cache(cache, "int8", True, True), _cache(cache, "float32", False, True)]
    rows, cache, positions = Shape(2, 1333, 2, 128), Shape(4, 1024, 8, 128), (False, True)
    cases = [_rows("flash", rows, *case) for case in itertools.product(("float32", "bfloat16"), _ROWS, positions)]
    kinds = ("float32", "bfloat16", "int8")
    return cases + [_cache(cache, *case, False) for case in itertools.product(kinds, positions)]


# ---------------------------------------------------------------------------------------------------------- whole rows


def _one_document(B: int, T: int) -> np.ndarray:
    return np.ones((B, T), np.int32)


def _documents(B: int, T: int) -> np.ndarray:
    """Documents of odd lengths, the last with two branches, then padding; another cut in each row."""
    rows = []
    for b in range(B):
        cuts = [0, T // 7 + b, T // 3 + 1, T // 2 + b, T // 2 + b + T // 9, T - T // 8, T - 3]
        ids = (1, 2, 3, 3 + (1 << TRUNK_BITS), 3 + (2 << TRUNK_BITS), 4)
        row = np.zeros(T, np.int32)
        for start, stop, segment in zip(cuts, cuts[1:], ids, strict=False):
            row[start:stop] = segment
        rows.append(row)
    return np.stack(rows)


_ROWS = (_one_document, _documents)
_TINY = BlockSizes(16, 8, 16, 16, 8, span=1024, vmem_mib=16)


def _rows(
    kernel: str,
    shape: Shape,
    dtype: str,
    segments: Callable[[int, int], np.ndarray],
    alibi: bool,
    interpret: bool = False,
) -> Case:
    position, documents = "ALiBi" if alibi else "RoPE", "documents" if segments is _documents else "one document"

    def run() -> tuple[dict[str, Array], dict[str, Array]]:
        ids = jnp.asarray(segments(shape.B, shape.T))
        tokens = Tokens(positions_of(ids), ids)
        slopes = jnp.asarray(alibi_slopes(shape.N)) if alibi else None

        def attend(q: Array, k: Array, v: Array) -> Array:
            if kernel == "cudnn":
                return cudnn_attention(q, k, v, tokens, slopes)
            return flash_attention(q, k, v, tokens, slopes, blocks=_TINY if interpret else None, interpret=interpret)

        def exact(q: Array, k: Array, v: Array) -> Array:
            with jax.default_matmul_precision("highest"):
                return reference_attention(q, k, v, tokens, slopes)

        inputs = _normal(4, (shape.B, shape.T, shape.N, shape.H), dtype)
        return _with_gradients(attend, inputs), _with_gradients(exact, [x.astype(jnp.float32) for x in inputs])

    return Case(f"{kernel} {dtype}, {position}, {documents}, {shape.T} tokens", dtype, run)


def _with_gradients(attend: Callable[..., Array], inputs: list[Array]) -> dict[str, Array]:
    @jax.jit
    def run(q: Array, k: Array, v: Array, d_out: Array) -> dict[str, Array]:
        out, pull = jax.vjp(attend, q, k, v)
        return dict(zip(("forward", "dq", "dk", "dv"), (out, *pull(d_out.astype(out.dtype))), strict=True))

    return run(*inputs)


# --------------------------------------------------------------------------------------------------------------- cache


def _cache(shape: Shape, kind: str, alibi: bool, interpret: bool) -> Case:
    """`shape.T` are the slots; rows end at odd places, one has no token."""
    dtype = "float32" if kind == "float32" else "bfloat16"

    def run() -> tuple[dict[str, Array], dict[str, Array]]:
        B, S, N, H = shape
        q, k, v = _normal(3, (B, N, H), dtype)
        held = _normal(2, (2, B, N, S, H), dtype)
        scales: list[Array | None] = [None, None]
        if kind == "int8":
            quantized = [quantize_tokens(x) for x in held]
            held = [x for x, _ in quantized]
            scales = [scale.reshape(2, B, N, S // LANES, LANES) for _, scale in quantized]
        cache = KVCache(*held, *scales)
        start = jnp.asarray([S // 2 + 7, 0, -1, S - 1][:B], jnp.int32)
        slopes = jnp.broadcast_to(jnp.asarray(alibi_slopes(N)), (B, N)) if alibi else None
        layer, used = jnp.int32(1), start >= 0
        got, new = jax.jit(lambda *a: flash_decode(*a, interpret=interpret))(q, k, v, cache, layer, start, slopes)
        with jax.default_matmul_precision("highest"):
            place = Place(jnp.arange(B), start)
            exact = jax.jit(cached_attention)(q[:, None], k[:, None], v[:, None], cache, layer, place, slopes)
        chosen = [jnp.where(used[:, None, None], x, 0) for x in (got, exact[0][:, 0])]
        return {"forward": chosen[0], "cache": _values(new)}, {"forward": chosen[1], "cache": _values(exact[1])}

    position = "ALiBi" if alibi else "RoPE"
    return Case(f"flash_decode {kind} cache, {position}, {shape.T} slots", dtype, run)


def _values(cache: KVCache) -> Array:
    """fp32 keys of all slots."""
    keys = cache.k.astype(jnp.float32)
    return keys if cache.k_scale is None else keys * cache.k_scale.reshape(*keys.shape[:4], 1)


# -------------------------------------------------------------------------------------------------------------- errors


def _normal(count: int, shape: tuple[int, ...], dtype: str) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(count)]


def pairs(got: dict[str, Array], wanted: dict[str, Array]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (np.asarray(x, np.float64), np.asarray(wanted[name], np.float64)) for name, x in got.items()}


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest entry of `wanted`; NaN if one is not finite."""
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30))
