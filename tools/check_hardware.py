"""`bc2 check-hardware` as a file: `python tools/check_hardware.py --help`."""

import sys

from bc2_jax.cli.check_hardware import main

if __name__ == "__main__":
    sys.exit(main())
