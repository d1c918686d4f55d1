"""`bc2 checkpoints` as a file: `python tools/checkpoints.py --help`."""

import sys

from bc2_jax.cli.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
