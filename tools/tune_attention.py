"""`bc2 tune-attention` as a file: `python tools/tune_attention.py --help`."""

import sys

from bc2_jax.cli.tune_attention import main

if __name__ == "__main__":
    sys.exit(main())
