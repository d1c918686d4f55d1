"""`bc2 evaluate` as a file: `python tools/evaluate.py --help`."""

import sys

from bc2_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
