"""The tables of docs/tpu.md are those that the program writes from docs/tpu/*.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bc2_jax.aot.tables import TABLES, read_rows, render_page, write_rows

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = {
    "items": 12_342,
    "subjects": 52,
    "shot_tokens": 450,
    "question_tokens": 80,
    "rows": 275.4,
    "estimated_seconds": 45.2,
}


def test_the_committed_page_is_what_the_program_writes():
    page = (DOCS / "tpu.md").read_text(encoding="utf-8")
    assert render_page(page, DOCS / "tpu") == page


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_files_are_as_the_program_writes_them(tmp_path, name):
    write_rows(tmp_path, name, read_rows(DOCS / "tpu", name))
    assert (tmp_path / f"{name}.json").read_bytes() == (DOCS / "tpu" / f"{name}.json").read_bytes()


def test_a_changed_figure_changes_the_page(tmp_path):
    for name in TABLES:
        write_rows(tmp_path, name, read_rows(DOCS / "tpu", name))
    write_rows(tmp_path, "scoring", [{"cells": ["C-Eval test"], "figures": FIGURES}])
    page = (DOCS / "tpu.md").read_text(encoding="utf-8")
    assert "| C-Eval test | 12,342 | 52 | 450 | 80 | 275 | 45 |\n<!-- end -->" in render_page(page, tmp_path)


def test_a_page_without_a_table_is_refused():
    page = (DOCS / "tpu.md").read_text(encoding="utf-8").replace("<!-- table: remat -->", "")
    with pytest.raises(ValueError, match="it must have each of .*remat.* once"):
        render_page(page, DOCS / "tpu")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "remat.json").write_text(json.dumps([{"cells": []}]))
    with pytest.raises(ValueError, match=r"remat\.json is not valid: it must be a list of objects"):
        read_rows(tmp_path, "remat")
