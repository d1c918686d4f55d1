"""`bc2 prepare-chat` as a file: `python tools/prepare_chat.py --help`."""

import sys

from bc2_jax.cli.prepare_chat import main

if __name__ == "__main__":
    sys.exit(main())
