"""`bc2 demo` as a file: `python tools/demo.py --all`."""

import sys

from bc2_jax.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
