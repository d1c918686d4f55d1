"""Process settings for JAX on a CPU; they do not change results."""

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
    """Makes glibc keep freed memory, so that large buffers are not page-faulted again at each step; returns whether it
    did.

    XLA:CPU allocates temporaries and outputs with malloc, and glibc maps blocks above 32 MB again for each call. The
    settings need a single arena for all threads: compilation at the start takes about 1 s longer, each step takes at
    least a tenth less (benchmarks/cpu_step.py --no-keep-heap). Call it before JAX starts its threads. False without
    glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def has_tpu() -> bool:
    """Whether the TPU driver's device files exist on this machine."""
    return any(list(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))


def choose_cpu_without_tpu() -> bool:
    """Sets JAX's platform to CPU if libtpu is installed but the machine has no TPU; returns whether it did.

    JAX would first try libtpu, which prints lines of errors, and then use the CPU. Does nothing if the user chose a
    platform (JAX_PLATFORMS, JAX_FORCE_TPU_INIT) or a JAX plug-in may provide an accelerator. Call it before the first
    JAX computation; child processes inherit the setting.
    """
    if os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ:
        return False
    # The same search as in jax/_src/xla_bridge.py, discover_pjrt_plugins.
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if plugins or has_tpu():
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None and jax.config.jax_platforms is None:  # JAX is imported already
        jax.config.update("jax_platforms", "cpu")
    return True
