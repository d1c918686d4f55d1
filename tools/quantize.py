"""`bc2 quantize` as a file: `python tools/quantize.py --help`."""

import sys

from bc2_jax.cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
