"""BBH from files in its formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bc2_jax.evaluate.task import Example, Judged
from bc2_jax.evaluate.tasks.bbh import NAMES, TASK, judge
from tests.evaluate.tasks.files import write, write_lines

SHOTS = "".join(
    f"Q: Is {n} even?\nA: Let's think step by step.\n{n} is even. So the answer is yes.\n\n" for n in (2, 4, 6)
)
WARNING = "This file must not be trained on. canary 1\n-----\n"
ITEMS = [{"input": "Is 8 even?", "target": "yes"}, {"input": "Is 9 even?\nOptions:\n(A) yes\n(B) no", "target": "(B)"}]


def released(folder: Path, end: str = "\n") -> Path:
    for name in NAMES:
        write(folder / "bbh" / f"{name}.json", json.dumps({"canary": "1", "examples": ITEMS}))
        write(folder / "cot-prompts" / f"{name}.txt", f"{WARNING}About {name}.\n\n{SHOTS}".replace("\n", end))
    return folder


@pytest.mark.parametrize(("place", "end"), [("", "\n"), ("bbh", "\r\n"), ("BIG-Bench-Hard", "\n")])
def test_examples(tmp_path, place, end):
    released(tmp_path / place, end)
    examples = TASK.load(tmp_path).examples
    assert len(examples) == 2 * 27 and [example.id for example in examples[:2]] == [f"{NAMES[0]}/0", f"{NAMES[0]}/1"]
    assert examples[0].prompt == (
        f"Follow the given examples and answer the question.\nAbout {NAMES[0]}.\n\n{SHOTS}"
        "Q: Is 8 even?\nA: Let's think step by step."
    )
    assert len(examples[0].shots) == 3 and examples[1].target == "(B)"


def test_other_formats(tmp_path):
    released(tmp_path)
    write(tmp_path / "bbh" / f"{NAMES[0]}.json", json.dumps(ITEMS, indent=1))
    (tmp_path / "bbh" / f"{NAMES[1]}.json").unlink()
    write_lines(tmp_path / "bbh" / f"{NAMES[1]}.jsonl", ITEMS)
    assert len(TASK.load(tmp_path).examples) == 2 * 27


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bbh/navigate.json", None, "bbh/navigate.json is missing: the items of navigate"),
        ("bbh/navigate.json", '{"examples": [{"input": "a"', "navigate.json:1: the line is not JSON"),
        ("bbh/navigate.json", '{"examples": []}', "navigate.json holds no examples"),
        ("bbh/navigate.json", '{"examples": [{"input": "a"}]}', r"\(example 1\) .* object with input, target"),
        ("bbh/navigate.json", '{"examples": ["a"]}', r"\(example 1\) .* object with input, target"),
        ("cot-prompts/navigate.txt", None, "cot-prompts/navigate.txt is missing: the worked examples of navigate"),
        (
            "cot-prompts/navigate.txt",
            "Q: a\nA: b\n",
            "has 1 worked examples instead of 3: each begins",
        ),
        ("cot-prompts/navigate.txt", b"\xff", "is not UTF-8"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, name, content, message):
    released(tmp_path)
    (tmp_path / name).unlink() if content is None else write(tmp_path / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TASK.load(tmp_path)


@pytest.mark.parametrize(
    ("target", "text", "answer"),
    [
        ("(B)", " It is 2. So the answer is (B).", "(B)"),
        ("(B)", "So the answer is B.", "(B)"),
        ("(B)", "Not (A). So the answer is (B). Or (C)?", "(B)"),
        ("(B)", "It is (B)", "(B)"),
        ("(B)", "So the answer is unknown.", ""),
        ("(B)", "A man went home.", ""),
        ("yes", "So the answer is yes.", "yes"),
        ("yes", "So the answer is yes. And more.\nmore", "yes. And more"),
        ("yes", "So the answer is **yes**.", "yes"),
        ("] ) }", "So the answer is ] ) }.", "] ) }"),
        ("-12", "So the answer is -12.", "-12"),
        ("apple banana", "So the answer is apple banana\n", "apple banana"),
        ("yes", "yes", "yes"),
        ("yes", "", ""),
    ],
)
def test_answers(target, text, answer):
    verdict = judge(Example(id="0", group="", question="", target=target), text)
    assert verdict == (answer == target, answer)


def test_the_mean_over_tasks_comes_first():
    judged = [
        Judged(Example(id=str(n), group=group, question=""), {"exact": right}, "")
        for n, (group, right) in enumerate([("a", True), ("a", True), ("a", True), ("b", False)])
    ]
    assert [(name, metric.value) for name, metric in TASK.summarize(judged).items()] == [
        ("exact, mean of groups", 50),
        ("exact", 75),
    ]
