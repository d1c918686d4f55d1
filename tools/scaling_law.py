"""`bc2 scaling-law` as a file: `python tools/scaling_law.py --help`."""

import sys

from bc2_jax.cli.scaling_law import main

if __name__ == "__main__":
    sys.exit(main())
