"""`bc2 red-team` as a file: `python tools/red_team.py --help`."""

import sys

from bc2_jax.cli.red_team import main

if __name__ == "__main__":
    sys.exit(main())
