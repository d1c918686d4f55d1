"""Settings of the process for JAX on a CPU; they change no result."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_heap() -> bool:
    """Keeps freed memory in the process for good, so that large buffers are not page-faulted again each step.

    XLA:CPU allocates every temporary and output with malloc; glibc maps those above 32 MB afresh each time. One arena
    for all threads is needed for it (only the main one grows without bound) and makes the compiler's threads wait for
    each other: about a second more for a first start, against a tenth or more of each step (benchmarks/cpu_step.py
    --no-keep-heap). To be called before JAX starts its threads. Returns whether the C library is one that can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def has_tpu() -> bool:
    """Whether this machine has a TPU: the driver's device files are there."""
    return any(list(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))


def choose_cpu_without_tpu() -> bool:
    """Has JAX use the CPU at once where libtpu is installed but the machine has no TPU; returns whether it did.

    JAX would ask libtpu first, which prints lines of errors before JAX takes the CPU all the same. Nothing is chosen
    where the user has (JAX_PLATFORMS, JAX_FORCE_TPU_INIT) or a plug-in of JAX may bring another accelerator. To be
    called before the first JAX computation; processes that are started later inherit the choice.
    """
    if os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ:
        return False
    # As JAX looks for them: jax/_src/xla_bridge.py, discover_pjrt_plugins.
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if plugins or has_tpu():
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None and jax.config.jax_platforms is None:  # it has read the variable
        jax.config.update("jax_platforms", "cpu")
    return True
