"""What a TPU pod will do, read from the compiled program: no TPU is needed, nothing is measured.

Training never imports this package; `tools/aot_compile.py` does. docs/tpu.md says what the figures are worth.
"""
