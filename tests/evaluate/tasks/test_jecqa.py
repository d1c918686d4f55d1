"""JEC-QA's files: single answers only, two kinds of questions, tests without answers."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.tasks.jecqa import TASK
from tests.evaluate.tasks.files import sums, write_lines


def row(n: int, kind: str = "0", **more) -> dict:
    [(text, values, gold)] = sums(1, n)
    options = dict(zip("ABCD", values, strict=True))
    return {
        "id": f"{kind}_{n}",
        "statement": text,
        "option_list": options,
        "answer": ["ABCD"[gold]],
        "type": kind,
        **more,
    }


def test_single_answers_of_both_kinds(tmp_path):
    folder = tmp_path / "JEC-QA"
    several = [row(20, answer=["A", "B"]), row(21, answer=["A", "B", "C", "D"])]
    write_lines(folder / "0_train.json", [*map(row, range(8)), *several])
    write_lines(folder / "1_train.json", [row(n, "1") for n in range(6)])
    hidden = row(1)
    del hidden["answer"]
    write_lines(folder / "0_test.json", [hidden, row(2, answer=[])])
    loaded = TASK.load(tmp_path)
    assert loaded.left_out == {"more than one right answer": 2, "answer not published": 2, "used as shots": 10}
    assert [one.group for one in loaded.examples] == ["analysis of cases"] + ["knowledge"] * 3
    assert loaded.notes == ()
    asked = loaded.examples[-1]
    text, (a, b, c, d), gold = sums(1, int(asked.id.rpartition("/")[2]))[0]
    assert asked.header == "以下是中国关于国家司法考试的单项选择题，请选出其中的正确答案。\n\n"
    assert asked.question == f"{text}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n答案："
    assert asked.gold == (gold,)
    assert len(asked.shots) == 5


def test_older_names_and_letters_in_one_text(tmp_path):
    write_lines(tmp_path / "jecqa" / "train.jsonl", [row(n, "01"[n % 2], answer="ABCD"[n % 4]) for n in range(4)])
    loaded = TASK.load(tmp_path)
    assert sorted(one.group for one in loaded.examples) == ["analysis of cases", "knowledge"]
    write_lines(tmp_path / "jecqa" / "train.jsonl", [row(n, answer="AC") for n in range(4)])
    loaded = TASK.load(tmp_path)
    assert (loaded.examples, loaded.left_out) == ([], {"more than one right answer": 4})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"answer": ["E"]}, r"'answer' is \['E'\]; it must be one of A, B, C, D"),
        ({"statement": " "}, "'statement' is empty"),
        ({"option_list": {"A": "1", "C": "2"}}, "'option_list' is .*; it must be an object with A, B, C, D"),
        ({"option_list": ["1", "2", "3", "4"]}, "'option_list' is .*; it must be an object"),
    ],
)
def test_damaged_rows(tmp_path, more, said):
    write_lines(tmp_path / "jecqa" / "0_train.json", [row(0), row(1, **more)])
    with pytest.raises(ValueError, match=f"0_train.json:2: {said}"):
        TASK.load(tmp_path)
