"""`bc2 parity` as a file: `python tools/check_parity.py --help`."""

import sys

from bc2_jax.cli.check_parity import main

if __name__ == "__main__":
    sys.exit(main())
