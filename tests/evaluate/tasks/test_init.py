"""Every task is found by its name."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.tasks import TASKS, find_task


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str, tmp_path):
    task = find_task(name)
    assert task.name == name
    assert set(task.paper) <= {"7B", "13B"}
    assert bool(task.paper) <= bool(task.paper_source)
    with pytest.raises(FileNotFoundError, match=r"DATA_DIR|C-Eval"):
        task.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        task.load(tmp_path / "nowhere")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no task 'cmlu'. Did you mean 'cmmlu'\? Known tasks: ceval, ceval_test, mmlu"
    ):
        find_task("cmlu")
