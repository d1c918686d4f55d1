"""Checks a tokenizer on fewer code points: on all it takes half a minute (done once, in test_tokenizer_report.py).

As a program: few_code_points.py PROGRAM ARGUMENT... runs another one so.
"""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Callable

from bc2_jax.data import tokenizer_report


def take_few(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Of the blocks of 1,024 code points that a tokenizer is checked on, the first of each 16 remains."""
    every = tokenizer_report._code_points
    set_attribute(tokenizer_report, "_code_points", lambda: itertools.islice(every(), 0, None, 16))


if __name__ == "__main__":
    take_few()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
