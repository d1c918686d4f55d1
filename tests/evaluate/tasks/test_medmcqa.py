"""MedMCQA's files; whether cop counts from 0 or from 1 is seen in a whole file, and said."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bc2_jax.evaluate.tasks.medmcqa import TASK
from tests.evaluate.tasks.files import sums, write, write_lines


def row(n: int, first: int = 1, **more) -> dict:
    [(text, (a, b, c, d), gold)] = sums(1, n)
    options = {"opa": a, "opb": b, "opc": c, "opd": d}
    return {"id": f"x{n}", "question": text, **options, "cop": gold + first, "choice_type": "single", **more}


def put(folder, dev, train, first: int = 1):
    write_lines(folder / "dev.json", [row(n, first) for n in dev])
    write_lines(folder / "train.json", [row(n, 1) for n in train])


@pytest.mark.parametrize("first", [0, 1])
def test_cop_counts_from_what_the_whole_file_shows(tmp_path, first):
    put(tmp_path / "medmcqa", range(4, 12), range(9), first)
    loaded = TASK.load(tmp_path)
    assert [one.gold[0] for one in loaded.examples] == [n % 4 for n in range(4, 12)]
    assert f"cop of the dev split is taken to count from {first}, as its values show." in loaded.notes
    assert "cop of the train split is taken to count from 1, as its values show." in loaded.notes
    asked = loaded.examples[0]
    assert asked.question == "4 加 1 等于多少？\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer:"
    assert asked.header == "The following are multiple choice questions (with answers) about medicine.\n\n"
    assert len(asked.shots) == 5
    for shot in asked.shots:
        assert shot.endswith(f"Answer: {'ABCD'[int(shot.split()[0]) % 4]}\n\n")


def test_several_answers_are_left_out_and_what_may_be_either_is_said(tmp_path):
    folder = tmp_path / "medmcqa"
    put(folder, [0, 1, 2], range(9))
    write_lines(folder / "dev.json", [row(0), row(1), row(2, choice_type="multi")])
    loaded = TASK.load(tmp_path)
    assert [one.gold for one in loaded.examples] == [(0,), (1,)]
    assert loaded.left_out == {"several answers may be right (choice_type multi)": 1}
    assert "count from 1, as usual in such files; its values would allow the other too" in loaded.notes[0]


def test_the_dataset_of_hugging_face(tmp_path):
    folder = tmp_path / "medmcqa" / "data"
    for split, numbers in (("validation", (1, 2)), ("train", range(8))):
        path = write(folder / f"{split}-00000-of-00001.parquet", "")
        pq.write_table(pa.Table.from_pylist([row(n, 0) for n in numbers]), path)
    loaded = TASK.load(tmp_path)
    assert [one.gold for one in loaded.examples] == [(1,), (2,)]
    assert "dev split is taken to count from 0, as usual in such files" in loaded.notes[0]


def test_what_is_wrong_is_named(tmp_path):
    folder = tmp_path / "medmcqa"
    put(folder, range(4), range(9))
    for bad, said in (
        (row(2, cop=5), "'cop' is 5; it must be from 1 to 4 or from 0 to 3"),
        (row(2, cop=None), "'cop' is None"),
        (row(2, cop=True), "'cop' is True"),
        (row(2, question=""), "'question' is empty"),
        (row(2, opc=["5"]), "'opc' is .*; it must be text"),
    ):
        write_lines(folder / "dev.json", [row(1), bad])
        with pytest.raises(ValueError, match=f"dev.json:2: {said}"):
            TASK.load(tmp_path)
    write_lines(folder / "dev.json", [row(3), row(2, cop=0)])
    with pytest.raises(ValueError, match=r"'cop' is 0 at .*dev.json:2 and 4 at .*dev.json:1: it must be from 1 to 4"):
        TASK.load(tmp_path)
    put(folder, range(4), range(9))
    (folder / "train.json").rename(folder / "training.json")
    with pytest.raises(FileNotFoundError, match=r"does not hold train.json .*dev.json, training.json is there"):
        TASK.load(tmp_path)
