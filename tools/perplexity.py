"""`bc2 perplexity` as a file: `python tools/perplexity.py --help`."""

import sys

from bc2_jax.cli.perplexity import main

if __name__ == "__main__":
    sys.exit(main())
