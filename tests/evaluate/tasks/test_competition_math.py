"""MATH from files in its format."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bc2_jax.evaluate.task import Example
from bc2_jax.evaluate.tasks.competition_math import TASK, judge
from tests.evaluate.tasks.files import write

CATEGORIES = ("algebra", "counting_and_probability", "geometry", "number_theory", "prealgebra")


def problem(n: int, solution: str = r"Half of it is $\boxed{\frac{PLACE}{2}}$.") -> str:
    solution = solution.replace("PLACE", str(n))
    return json.dumps(
        {"problem": f"What is half of ${n}$?", "level": "Level 2", "type": "Algebra", "solution": solution}
    )


def released(folder: Path) -> Path:
    for place, category in enumerate(CATEGORIES):
        for number in (2, 10, 1):
            write(folder / "test" / category / f"{number}.json", problem(number))
            long = "So it is. " * 50 if number == 1 else ""
            write(
                folder / "train" / category / f"{number}.json", problem(100 * place + number, long + r"\boxed{PLACE}")
            )
    return folder


def test_examples(tmp_path):
    released(tmp_path / "math" / "MATH")
    loaded = TASK.load(tmp_path)
    assert [example.id for example in loaded.examples[:4]] == ["algebra/1", "algebra/2", "algebra/10"] + [
        "counting_and_probability/1"
    ]
    first = loaded.examples[0]
    assert first.target == r"\frac{1}{2}" and first.group == "algebra" and first.facts == {"level": "Level 2"}
    assert first.question == "Problem:\nWhat is half of $1$?\nSolution:"
    # Problem 1 of each category has too long a solution; one of each category.
    assert [shot.split("half of ")[1].split("?")[0] for shot in first.shots] == ["$2$", "$102$", "$202$", "$302$"]
    assert first.shots[0] == (
        "Problem:\nWhat is half of $2$?\n\nSolution:\n\\boxed{2}\n"
        "Final Answer: The final answer is $2$. I hope it is correct.\n\n"
    )
    assert "not Minerva's four" in loaded.notes[0] and loaded.notes[1] == "15 problems instead of 5000."


def test_tables(tmp_path):
    for category in CATEGORIES:
        for split, count in (("test", 2), ("train", 1)):
            rows = [json.loads(problem(n, r"\boxed{PLACE}")) for n in range(count)]
            (tmp_path / "hendrycks_math" / category).mkdir(parents=True, exist_ok=True)
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, tmp_path / "hendrycks_math" / category / f"{split}-00000-of-00001.parquet")
    examples = TASK.load(tmp_path).examples
    assert [example.id for example in examples[:3]] == ["algebra/0", "algebra/1", "counting_and_probability/0"]
    assert len(examples) == 10 and len(examples[0].shots) == 4 and examples[1].target == "1"


def test_shots_of_the_user(tmp_path):
    write(tmp_path / "test" / "algebra" / "1.json", problem(3))
    shots = "\n".join(f"Problem:\nWhat is {n}?\n\nSolution:\n$\\boxed{{{n}}}$.\n" for n in range(4))
    write(tmp_path / "shots.txt", shots)
    example = TASK.load(tmp_path).examples[0]
    assert example.prompt == shots + "\nProblem:\nWhat is half of $3$?\nSolution:"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"test/CATEGORY/NUMBER.json"),
        ({"test/readme.txt": "x"}, "holds no CATEGORY/NUMBER.json"),
        ({"test/algebra/1.json": '{"problem": "a"'}, "1.json:1: the line is not JSON"),
        ({"test/algebra/1.json": '{"problem": "a"}'}, "lacks 'solution'"),
        ({"test/algebra/1.json": '{"problem": "a", "solution": "5"}'}, r"'solution' has no answer in \\boxed"),
        ({"test/algebra/1.json": problem(1) + "\n" + problem(2)}, "holds 2 objects; it must hold one problem"),
        ({"train": None, "test/algebra/1.json": problem(1)}, "shots of MATH are missing: .*shots.txt"),
        ({"test/algebra/1.json": problem(1)}, "has 0 categories with a short solution; 4 are needed"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, files, message):
    (tmp_path / "math").mkdir()
    if files and None not in files.values():
        write(tmp_path / "math/train/algebra/1.json", problem(1, "[asy] draw(PLACE) [/asy] \\boxed{1}"))
    for name, content in files.items():
        if content is not None:
            write(tmp_path / "math" / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TASK.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"Half is $\boxed{\dfrac12}$. Final Answer: The final answer is $3$.", True),
        ("Final Answer: The final answer is $0.5$. I hope it is correct.", True),
        (r"\boxed{\frac12} or better \boxed{2}", False),
        ("I do not know", False),
        ("", False),
    ],
)
def test_answers(text, right):
    example = Example(id="0", group="", question="", target=r"\frac{1}{2}")
    assert judge(example, text).right is right
