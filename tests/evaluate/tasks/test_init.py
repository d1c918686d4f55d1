"""Every task is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bc2_jax.evaluate.tasks import TASKS, find_task

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str, tmp_path):
    task = find_task(name)
    assert task.name == name
    assert set(task.paper) <= {"7B", "13B"}
    assert bool(task.paper) <= bool(task.paper_source)
    with pytest.raises(FileNotFoundError, match=r"DATA_DIR|C-Eval"):
        task.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        task.load(tmp_path / "nowhere")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no task 'cmlu'. Did you mean 'cmmlu'\? Known tasks: ceval, ceval_test, mmlu"
    ):
        find_task("cmlu")


@pytest.mark.parametrize("name", [name for name in TASKS if find_task(name).kind == "letters"])
def test_the_docs_have_the_papers_figures(name: str):
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert ", ".join(f"{value:.2f}" for value in find_task(name).paper.values()) in row
