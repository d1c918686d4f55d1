"""`bc2 generate` as a file: `python tools/generate.py --help`."""

import sys

from bc2_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
