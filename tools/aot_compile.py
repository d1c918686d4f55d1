"""`bc2 estimate` as a file: `python tools/aot_compile.py --help`."""

import sys

from bc2_jax.cli.aot_compile import main

if __name__ == "__main__":
    sys.exit(main())
