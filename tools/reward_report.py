"""`bc2 reward-report` as a file: `python tools/reward_report.py --help`."""

import sys

from bc2_jax.cli.reward_report import main

if __name__ == "__main__":
    sys.exit(main())
