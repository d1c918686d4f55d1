"""`bc2 curate` as a file: `python tools/curate.py --help`."""

import sys

from bc2_jax.cli.curate import main

if __name__ == "__main__":
    sys.exit(main())
