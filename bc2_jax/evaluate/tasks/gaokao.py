"""GAOKAO-Bench: the Chinese college entrance examination, 2010-2022; questions with one right answer of four."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import CEVAL, SEED, Item, make_examples, partition, too_few
from bc2_jax.evaluate.tasks.reading import Row, find_folder, missing_files, read_rows

SHOTS = 5
SUBJECTS = {
    "2010-2013_English_MCQs": "高考英语",
    "2010-2022_Biology_MCQs": "高考生物",
    "2010-2022_Chemistry_MCQs": "高考化学",
    "2010-2022_History_MCQs": "高考历史",
    "2010-2022_Math_II_MCQs": "高考文科数学",
    "2010-2022_Math_I_MCQs": "高考理科数学",
    "2010-2022_Political_Science_MCQs": "高考政治",
}
_SEVERAL_QUESTIONS = "several questions of one text"
OTHERS = {
    "2010-2022_Chinese_Lang_and_Usage_MCQs": _SEVERAL_QUESTIONS,
    "2010-2022_Chinese_Modern_Lit": _SEVERAL_QUESTIONS,
    "2010-2022_English_Fill_in_Blanks": _SEVERAL_QUESTIONS,
    "2010-2022_English_Reading_Comp": _SEVERAL_QUESTIONS,
    "2010-2022_Geography_MCQs": _SEVERAL_QUESTIONS,
    "2010-2022_Physics_MCQs": "physics, where several answers may be right",
    "2012-2022_English_Cloze_Test": "five sentences to choose of seven",
}
"""Files of other kinds of questions -> why they are left out."""
SOURCE = (
    'the files 2010-2022_Biology_MCQs.json and so on, JSON {"keywords": ..., "example": [{"question": text with its '
    'options, "answer": ["A"], ...}]}, of Data/Objective_Questions in github.com/OpenLMLab/GAOKAO-Bench, in '
    "DATA_DIR/gaokao."
)
# The letters that options begin with: "A．", "A." or "A、". Whatever comes before, since PDFs lost some line ends.
_OPTION = re.compile(r"([A-D])\s?[．.、]")
_FIFTH = re.compile(r"(?:^|\s)E\s?[．.、]")


def load(data_dir: Path) -> Loaded:
    """Of each subject five random questions as shots, and the others."""
    folder = find_folder(
        data_dir, ("gaokao", "GAOKAO-Bench", "GAOKAO-Bench-main"),
        ("Data/Objective_Questions", "Objective_Questions", "", "data/Multiple-choice_Questions"),
        lambda place: any((place / f"{name}.json").is_file() for name in SUBJECTS), SOURCE,
    )  # fmt: skip
    examples, left_out, notes = [], Counter[str](), missing_files(folder, [f"{name}.json" for name in SUBJECTS])
    for name, reason in OTHERS.items():
        if (folder / f"{name}.json").is_file():
            left_out[reason] += sum(1 for _ in _rows(folder / f"{name}.json"))
    for name, subject in SUBJECTS.items():
        if not (folder / f"{name}.json").is_file():
            continue
        items = []
        for number, row in enumerate(_rows(folder / f"{name}.json")):
            question = row.filled("question").strip()
            gold = row.answers("answer" if "answer" in row.values else "standard_answer", "ABCDEFG")
            if not gold:
                raise ValueError(f"{row.where}: no answer is given.")
            if len(gold) > 1:
                left_out["more than one right answer"] += 1
            elif not _has_four_options(question) or gold[0] > 3:
                left_out["not four options, A to D, in the question's text"] += 1
            else:
                items.append(Item(f"{name}/{number}", question, (), gold[0], letters="ABCD"))
        shots, asked = partition(items, SHOTS)
        notes += too_few(shots, SHOTS, name)
        examples += make_examples(asked, shots, CEVAL, subject, name)
        left_out["used as shots"] += len(shots)
    return Loaded(examples, dict(left_out), tuple(notes))


def _rows(path: Path) -> Iterator[Row]:
    """The items of the list that a file holds."""
    for content in read_rows(path, needed=("example",)):
        items = content.values["example"]
        if not isinstance(items, list):
            raise ValueError(f"{content.where}: 'example' must be a list of questions.")
        for number, item in enumerate(items, 1):
            where = f"{path} (example {number})"
            if not isinstance(item, dict):
                raise ValueError(f"{where}: it must be an object with question and answer.")
            yield Row(item, where)


def _has_four_options(question: str) -> bool:
    letters = iter(_OPTION.findall(question))
    return all(letter in letters for letter in "ABCD") and not _FIFTH.search(question)


TASK = Task(
    name="gaokao",
    title="Gaokao",
    source=SOURCE,
    kind="letters",
    shots=SHOTS,
    load=load,
    paper={"7B": 47.47, "13B": 54.33},
    paper_source="Table 1 and README",
    notes=(
        "The paper's random partition of the questions is not published, so its figure can't be met exactly: here five "
        f"questions of each subject, chosen with the seed {SEED}, are the shots, and all others are asked.",
        "The prompt is C-Eval's, which the paper says it is like; the options stand in the question's text.",
        "The benchmark's own measure is points of the examination; this is accuracy, as in the paper.",
    ),
)
