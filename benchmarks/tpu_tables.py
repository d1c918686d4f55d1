"""Writes the tables of docs/tpu.md from docs/tpu/*.json, after compiling some of their rows again.

python benchmarks/tpu_tables.py
python benchmarks/tpu_tables.py --compile presets --rows '13B.*v5p-128'

--compile runs tools/aot_compile.py with the `arguments` of each row, one after another, and takes 2-5 CPU minutes a
row (needs the tpu extra, no TPU). A row that does not compile keeps its figures. Rows without `arguments` come from
--json of benchmarks/loss.py, benchmarks/calibration.py and tools/tune_attention.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bc2_jax.aot.search import run_aot_compile
from bc2_jax.aot.tables import TABLES, read_rows, render_page, write_rows

DOCS = Path(__file__).parents[1] / "docs"


def compile_rows(name: str, pattern: str) -> None:
    """Compiles the rows of a table whose cells match `pattern`, and saves each as soon as it is done."""
    rows = read_rows(DOCS / "tpu", name)
    for row in rows:
        label = ", ".join(row["cells"])
        if "arguments" not in row or not re.search(pattern, label):
            continue
        figures = run_aot_compile(row["arguments"].split())
        if "error" in figures:
            print(f"{label}: {figures['error']}", flush=True)
            continue
        row["figures"] = figures
        row.pop("recorded", None)
        write_rows(DOCS / "tpu", name, rows)
        print(f"{label}: compiled", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", choices=tuple(TABLES), help="table whose rows are compiled again")
    parser.add_argument("--rows", default="", metavar="REGEX", help="compile only rows whose cells match")
    args = parser.parse_args()
    if args.compile:
        compile_rows(args.compile, args.rows)
    page = DOCS / "tpu.md"
    try:
        page.write_text(render_page(page.read_text(encoding="utf-8"), DOCS / "tpu"), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
