"""`bc2 train` as a file: `python train.py --help`."""

import sys

from bc2_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
