"""`bc2 train-quality` as a file: `python tools/train_quality.py --help`."""

import sys

from bc2_jax.cli.train_quality import main

if __name__ == "__main__":
    sys.exit(main())
