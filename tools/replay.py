"""`bc2 replay` as a file: `python tools/replay.py --help`."""

import sys

from bc2_jax.cli.replay import main

if __name__ == "__main__":
    sys.exit(main())
