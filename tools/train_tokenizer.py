"""`bc2 train-tokenizer` as a file: `python tools/train_tokenizer.py --help`."""

import sys

from bc2_jax.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
