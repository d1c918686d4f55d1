"""GAOKAO-Bench's files: options inside the question, kinds of questions that are left out, a partition with a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bc2_jax.evaluate.tasks.gaokao import SUBJECTS, TASK
from tests.evaluate.tasks.files import sums, write

HISTORY = "2010-2022_History_MCQs"


def question(n: int, options: str = "\nA．{}  B．{}\nC．{} D．{}\n") -> dict:
    [(text, values, gold)] = sums(1, n)
    return {
        "year": "2010", "category": "（甲卷）", "question": f"{n}．（4分）{text}（　　）{options.format(*values)}",
        "answer": ["ABCD"[gold]], "analysis": "略", "index": n, "score": 4,
    }  # fmt: skip


def put(folder: Path, name: str, examples: list) -> Path:
    return write(
        folder / f"{name}.json", json.dumps({"keywords": name, "example": examples}, ensure_ascii=False, indent=4)
    )


def test_single_choice_of_four_only(tmp_path):
    folder = tmp_path / "GAOKAO-Bench" / "Data" / "Objective_Questions"
    several = question(20) | {"answer": ["A", "C"]}
    five = question(21, "\nA．{} B．{}\nC．{} D．{}\nE．以上都不对\n")
    none = question(22, "")
    put(folder, HISTORY, [*map(question, range(8)), several, five, none])
    renamed = [question(30) | {"standard_answer": ["C"]}, question(31)]
    del renamed[0]["answer"]
    put(folder, "2010-2013_English_MCQs", renamed)
    put(folder, "2010-2022_Physics_MCQs", [question(1), question(2)])
    put(folder, "2010-2022_English_Reading_Comp", [question(3) | {"answer": ["A", "B", "C", "D"]}])
    write(folder / "gemini-pro_2010-2022_History_MCQs.json", "[")
    loaded = TASK.load(tmp_path)
    assert loaded.left_out == {
        "more than one right answer": 1,
        "not four options, A to D, in the question's text": 2,
        "physics, where several answers may be right": 2,
        "several questions of one text": 1,
        "used as shots": 5 + 1,
    }
    assert len(loaded.examples) == 3 + 1
    assert "Only 2 of 7 files" in loaded.notes[0]
    assert "2010-2013_English_MCQs: 1 shots instead of 5" in loaded.notes[1]
    asked = next(one for one in loaded.examples if one.group == HISTORY)
    number = int(asked.id.rpartition("/")[2])
    assert asked.header == "以下是中国关于高考历史考试的单项选择题，请选出其中的正确答案。\n\n"
    assert asked.question == question(number)["question"].strip() + "\n答案："
    assert (asked.choices, asked.bare, asked.gold) == (tuple("ABCD"), tuple("ABCD"), (number % 4,))
    assert len(asked.shots) == 5
    shown = {question(n)["question"].strip() + f"\n答案：{'ABCD'[n % 4]}\n" for n in range(8) if n != number}
    assert set(asked.shots) < shown
    assert TASK.load(tmp_path) == loaded
    # More questions do not change who of the old ones comes first.
    assert TASK.load(folder).examples == loaded.examples


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"keywords": "x"}), "lacks 'example'"),
        (json.dumps({"example": {}}), "'example' must be a list"),
        (json.dumps({"example": ["x"]}), r"\(example 1\): it must be an object"),
        (
            json.dumps({"example": [question(1), question(2) | {"question": " "}]}),
            r"\(example 2\): 'question' is empty",
        ),
        (json.dumps({"example": [question(1) | {"answer": []}]}), r"\(example 1\): no answer is given"),
        (json.dumps({"example": [question(1) | {"answer": ["X"]}]}), r"\(example 1\): 'answer' is \['X'\]"),
        (json.dumps({"example": [question(1)]})[:-1], "is not JSON"),
    ],
)
def test_damaged_files(tmp_path, content, said):
    write(tmp_path / "gaokao" / f"{HISTORY}.json", content)
    with pytest.raises(ValueError, match=said):
        TASK.load(tmp_path)


def test_subjects():
    assert len(SUBJECTS) == len(set(SUBJECTS.values())) == 7
