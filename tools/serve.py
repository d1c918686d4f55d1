"""`bc2 serve` as a file: `python tools/serve.py --help`."""

import sys

from bc2_jax.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
