"""Compiles for TPU pods without a TPU and estimates memory, communication and time (docs/tpu.md).

Only `tools/aot_compile.py` and benchmarks use it; training does not.
"""
