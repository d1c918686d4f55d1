"""`bc2 tokenize` as a file: `python tools/tokenize_corpus.py --help`."""

import sys

from bc2_jax.cli.tokenize_corpus import main

if __name__ == "__main__":
    sys.exit(main())
