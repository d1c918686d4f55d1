"""`bc2 inspect-data` as a file: `python tools/inspect_data.py --help`."""

import sys

from bc2_jax.cli.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
