"""The taxonomy that ships, what is refused in another, and plans of samples."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align.taxonomy import OUR_FILE, load_taxonomy, plan_samples

OURS = load_taxonomy()
RECORD = json.loads(OUR_FILE.read_text(encoding="utf-8"))


def test_ours_has_the_papers_counts_and_names_in_both_languages():
    counts = [len(OURS.at(level)) for level in (1, 2, 3)]
    assert counts[:2] == [6, 30] and counts[2] > 200
    for level in (1, 2, 3):
        assert math.fsum(c.quota for c in OURS.at(level)) == pytest.approx(1, abs=1e-12)
    for c in OURS.classes:
        assert re.search("[\u4e00-\u9fff]", c.zh) or c.id == "java_programs", c
        assert not re.search("[\u4e00-\u9fff]", c.en), c
        assert c.path[-1] == c.id
    assert {c.path[:-1] for c in OURS.at(3)} == {c.path for c in OURS.at(2)}


def test_classes_are_found_by_id_path_and_name():
    physics = OURS.find("physics")
    assert physics is not None and physics.path == ("knowledge", "natural_science", "physics")
    for name in (
        "Physics",
        "物理",
        " physics ",
        "knowledge/natural_science/physics",
        "knowledge.natural_science.physics",
    ):
        assert OURS.find(name) == physics, name
    assert OURS.find("School mathematics") == OURS.find("school-mathematics") == OURS.find("中小学数学")
    for name in ("", "nothing", None, 3, ["physics"]):
        assert OURS.find(name) is None
    assert all(OURS.find(c.id) == c for c in OURS.classes)


def first(record: dict, level: int) -> dict:
    for _ in range(level):
        record = record["classes"][0]
    return record


@pytest.mark.parametrize(
    ("level", "change", "told"),
    [
        (3, {"id": "algebra"}, None),
        (3, {"id": "biology"}, "'biology' is not unique"),
        (2, {"id": "knowledge"}, "'knowledge' is not unique"),
        (1, {"id": None}, "id None"),
        (2, {"id": "Ä"}, "a-z"),
        (3, {"zh": " "}, "zh and en"),
        (1, {"quota": 0.3}, "sum to 1.1"),
        (3, {"quota": 0}, "above 0"),
        (2, {"quota": True}, "above 0"),
        (2, {"quota": "1"}, "above 0"),
        (2, {"classes": []}, "at least one"),
        (3, {"classes": []}, "level 3"),
        (0, {"classes": {}}, "a list of objects"),
    ],
)
def test_another_file_is_checked(tmp_path, level: int, change: dict, told: str | None):
    record = copy.deepcopy(RECORD)
    first(record, level).update(change)
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    if told is None:
        assert load_taxonomy(path).find("algebra")
        return
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        load_taxonomy(path)
    assert str(path) in str(error.value)


def test_what_is_no_taxonomy(tmp_path):
    path = tmp_path / "taxonomy.json"
    with pytest.raises(FileNotFoundError):
        load_taxonomy(path)
    record = copy.deepcopy(RECORD)
    del first(record, 2)["classes"]
    for text in ("{", "[]", json.dumps(record)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is not a taxonomy"):
            load_taxonomy(path)


@given(st.integers(0, 100_000))
def test_a_plan_sums_up_and_is_within_one_of_each_quota(count: int):
    plan = plan_samples(OURS, count)
    assert sum(plan.values()) == count
    assert all(abs(plan[c.id] - count * c.quota) < 1 + 1e-6 for c in OURS.at(3))
