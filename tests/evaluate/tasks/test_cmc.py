"""CMC is made of parts of three benchmarks."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.task import Judged
from bc2_jax.evaluate.tasks.cmc import CEVAL_SUBJECTS, CMMLU_SUBJECTS, MMLU_SUBJECTS, TASK
from tests.evaluate.tasks import test_ceval, test_cmmlu, test_mmlu
from tests.evaluate.tasks.files import sums, write_csv


def test_parts_and_their_two_means(tmp_path):
    for subject in [*CEVAL_SUBJECTS, "law"]:
        for split in ("dev", "val"):
            write_csv(tmp_path / "ceval" / split / f"{subject}_{split}.csv", test_ceval.table(sums(5)))
    for subject in [*MMLU_SUBJECTS, "astronomy"]:
        for split in ("dev", "test"):
            write_csv(tmp_path / "mmlu" / split / f"{subject}_{split}.csv", test_mmlu.rows(sums(5)))
    for subject in [*CMMLU_SUBJECTS, "arts"]:
        for split in ("dev", "test"):
            write_csv(tmp_path / "cmmlu" / split / f"{subject}.csv", test_cmmlu.table(sums(5)))
    loaded = TASK.load(tmp_path)
    groups = {one.group for one in loaded.examples}
    assert len(groups) == 17
    assert not {"ceval/law", "mmlu/astronomy", "cmmlu/arts"} & groups
    assert len({one.id for one in loaded.examples}) == len(loaded.examples) == 17 * 5
    assert loaded.notes == ()
    assert {one.drop for one in loaded.examples} == {"last", "longest"}
    judged = [Judged(one, {"as_shown": one.group.startswith("ceval"), "bare": True}, "A") for one in loaded.examples]
    metrics = TASK.summarize(judged)
    assert next(iter(metrics)) == "as_shown, mean of subjects"
    assert metrics["as_shown, mean of subjects"].value == pytest.approx(100 * 2 / 17)
    assert metrics["as_shown, mean of benchmarks"].value == pytest.approx(100 / 3)
    assert metrics["bare, mean of benchmarks"] == (100, 0, 85)


def test_a_part_that_is_missing_is_named(tmp_path):
    write_csv(tmp_path / "ceval" / "dev" / "law_dev.csv", test_ceval.table(sums(5)))
    write_csv(tmp_path / "ceval" / "val" / "law_val.csv", test_ceval.table(sums(5)))
    with pytest.raises(FileNotFoundError, match=r"github.com/hendrycks/test"):
        TASK.load(tmp_path)
