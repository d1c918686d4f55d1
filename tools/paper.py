"""`bc2 paper` as a file: `python tools/paper.py --parts max_z`."""

import sys

from bc2_jax.cli.paper import main

if __name__ == "__main__":
    sys.exit(main())
