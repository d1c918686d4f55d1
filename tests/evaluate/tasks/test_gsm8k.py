"""GSM8K from files in its format."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate.task import Example
from bc2_jax.evaluate.tasks.gsm8k import TASK, judge
from tests.evaluate.tasks.files import write, write_lines


def item(n: int, steps: str = "") -> dict[str, str]:
    return {
        "question": f"A shelf has {n} jars. How many lids?",
        "answer": f"{steps}One each: {n}*1=<<{n}*1={n}>>{n}\n#### {n}",
    }


SHOT = "Question: How many?\nLet's think step by step\nAnswer:\nThey say {}.\nThe answer is {}\n"


def test_shots_of_the_training_set(tmp_path):
    write_lines(tmp_path / "gsm8k/test.jsonl", [item(1200), item(7)])
    write_lines(tmp_path / "gsm8k/train.jsonl", [item(1), item(2, "so " * 200), *[item(n) for n in (3, 4, 5, 6)]])
    loaded = TASK.load(tmp_path)
    first = loaded.examples[0]
    assert [example.id for example in loaded.examples] == ["0", "1"]
    assert first.shots[0] == (
        "Question: A shelf has 1 jars. How many lids?\nLet's think step by step\nAnswer:\n"
        "One each: 1*1=1\nThe answer is 1\n\n"
    )
    assert [shot.split("has ")[1].split(" ")[0] for shot in first.shots] == ["1", "3", "4", "5"]  # 2 is too long
    asked = "Question: A shelf has 1200 jars. How many lids?\nLet's think step by step\nAnswer:"
    assert first.prompt.endswith(f"The answer is 5\n\n{asked}")
    assert "the first 4 problems of train.jsonl" in loaded.notes[0]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_shots_of_the_user_come_first(tmp_path, end):
    rows = "".join(f'{{"question": "Lids?", "answer": "Few.\\n#### {n}"}}{end}' for n in ("1,000", "5"))
    write(tmp_path / "grade-school-math/grade_school_math/data/test.jsonl.gz", gzip.compress(rows.encode()))
    shots = "\n\n".join(SHOT.format(n, n) for n in range(5)).replace("\n", end)
    write(tmp_path / "grade-school-math/grade_school_math/data/shots.txt", shots)
    loaded = TASK.load(tmp_path)
    assert loaded.examples[0].shots == tuple(SHOT.format(n, n) + "\n" for n in range(4))
    assert [example.target for example in loaded.examples] == ["1000", "5"]
    assert "shots.txt" in loaded.notes[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"test.jsonl \(and train.jsonl"),
        ({"test.json1": "{}"}, r"\(test.json1, train.jsonl is there\): test.jsonl"),
        ({"test.jsonl": ""}, "test.jsonl holds no rows"),
        ({"test.jsonl": '{"question": "a", "answer": "#### 1"}\n{"question"'}, "test.jsonl:2: the line is not JSON"),
        ({"test.jsonl": '{"question": "a"}'}, "test.jsonl:1: lacks 'answer'"),
        ({"test.jsonl": '{"question": "a", "answer": "5"}'}, "test.jsonl:1: 'answer' must end in a line '#### NUMBER'"),
        ({"test.jsonl": '{"question": "a", "answer": "#### few"}'}, "must end in a line '#### NUMBER'"),
        ({"test.jsonl": '{"question": "a", "answer": "#### 1"}', "train.jsonl": None}, "shots of GSM8K are missing"),
        (
            {"test.jsonl": '{"question": "a", "answer": "#### 1"}', "shots.txt": SHOT},
            "has 1 worked examples instead of 4",
        ),
        (
            {"test.jsonl": '{"question": "a", "answer": "#### 1"}', "shots.txt": "Question: a\nAnswer:\n" * 4},
            "worked example 1 has no answer",
        ),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, files, message):
    (tmp_path / "gsm8k").mkdir()
    write_lines(tmp_path / "gsm8k/train.jsonl", [item(n) for n in range(4)])
    for name, content in files.items():
        if content is None:
            (tmp_path / "gsm8k" / name).unlink()
        else:
            write(tmp_path / "gsm8k" / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TASK.load(tmp_path)


def test_a_training_set_without_short_solutions(tmp_path):
    write_lines(tmp_path / "gsm8k/test.jsonl", [item(1)])
    write_lines(tmp_path / "gsm8k/train.jsonl", [item(n, "so " * 200) for n in range(9)])
    with pytest.raises(ValueError, match="has 0 problems with a short solution; 4 are needed"):
        TASK.load(tmp_path)


def judged(target: str, text: str) -> tuple[bool, str]:
    return judge(Example(id="0", group="", question="", target=target), text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("6 * 3 = 18\nThe answer is 18", True), ("The answer is 18.0.", True), ("#### 18", True), ("It is $18", True),
        ("18", True), ("18 eggs", True), ("**18**", True), ("She has 18%.", True), ("-18", False), ("180", False),
        ("118", False), ("no number", False), ("", False), ("eighteen", False), ("18, or rather 20", False),
        ("18\n\nQuestion: 5 cats and 6 dogs?\nAnswer: 11", True), ("Question: 18", False), ("1.8", False),
    ],
)  # fmt: skip
def test_answers(text, right):
    assert judged("18", text)[0] is right


@pytest.mark.parametrize("text", ["#### 1,000", "$1000", "1,000.00 dollars", "The answer is 1000.0."])
def test_thousands(text):
    assert judged("1000", text) == (True, "1000")


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.0", "${}", "{:,}.00", "is {}.", "({})"]))
def test_any_spelling_of_a_number_is_found(number, form):
    spelt = form.format(number).replace("$-", "-$") if number < 0 and form == "${}" else form.format(number)
    if spelt.startswith("-$"):
        spelt = f"${number}"
    text = f"First 3 and then 4: {spelt} in all\n\nQuestion: and 5 or 6?"
    assert judged(str(number), text) == (True, str(number))
    assert not judged(str(number + 1), text)[0]
