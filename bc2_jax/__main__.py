"""`python -m bc2_jax SUBCOMMAND` is `bc2 SUBCOMMAND`."""

import sys

from bc2_jax.cli.programs import main

if __name__ == "__main__":
    sys.exit(main())
