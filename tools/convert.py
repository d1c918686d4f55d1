"""`bc2 convert` as a file: `python tools/convert.py --help`."""

import sys

from bc2_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
