"""Settings of the process that make JAX on a CPU faster; they change no result."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_heap() -> bool:
    """Keeps freed memory in the process for good, so that large buffers are not page-faulted anew each step.

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
