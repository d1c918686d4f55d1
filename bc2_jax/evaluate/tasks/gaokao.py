"""GAOKAO-Bench: the Chinese college entrance examination, 2010-2022; questions with one right answer of four."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import CEVAL, SEED, SHOTS, Group, Item, ask_after_random_shots
from bc2_jax.evaluate.tasks.reading import Row, find_folder, missing_files, read_rows

SUBJECTS = {
    "2010-2013_English_MCQs": "高考英语", "2010-2022_Biology_MCQs": "高考生物",
    "2010-2022_Chemistry_MCQs": "高考化学", "2010-2022_History_MCQs": "高考历史",
    "2010-2022_Math_II_MCQs": "高考文科数学", "2010-2022_Math_I_MCQs": "高考理科数学",
    "2010-2022_Political_Science_MCQs": "高考政治",
}  # fmt: skip
OTHERS = {
    "2010-2022_Chinese_Lang_and_Usage_MCQs": "several questions of one text",
    "2010-2022_Chinese_Modern_Lit": "several questions of one text",
    "2010-2022_English_Fill_in_Blanks": "several questions of one text",
    "2010-2022_English_Reading_Comp": "several questions of one text",
    "2010-2022_Geography_MCQs": "several questions of one text",
    "2010-2022_Physics_MCQs": "physics, where several answers may be right",
    "2012-2022_English_Cloze_Test": "five sentences to choose of seven",
}
"""Files of other kinds of questions -> why they are left out."""
SOURCE = (
    'the files 2010-2022_Biology_MCQs.json and so on, JSON {"keywords": ..., "example": [{"question": text with its '
    'options, "answer": ["A"], ...}]}, of Data/Objective_Questions in github.com/OpenLMLab/GAOKAO-Bench, in '
    "DATA_DIR/gaokao."
)
# The letters before options: "A．", "A." or "A、", after anything, since PDFs lost some line ends.
_OPTION = re.compile(r"([A-D])\s?[．.、]")
_FIFTH = re.compile(r"(?:^|\s)E\s?[．.、]")


def load(data_dir: Path) -> Loaded:
    """Of each subject five random questions as shots, and the others."""
    folder = find_folder(
        data_dir, ("gaokao", "GAOKAO-Bench", "GAOKAO-Bench-main"),
        ("Data/Objective_Questions", "Objective_Questions", "", "data/Multiple-choice_Questions"),
        lambda place: any((place / f"{name}.json").is_file() for name in SUBJECTS), SOURCE,
    )  # fmt: skip
    left_out = Counter[str]()
    for name, reason in OTHERS.items():
        if (path := folder / f"{name}.json").is_file():
            left_out[reason] += sum(1 for _ in _rows(path))
    groups = [
        Group(name, subject, CEVAL, list(_items(path, left_out)))
        for name, subject in SUBJECTS.items()
        if (path := folder / f"{name}.json").is_file()
    ]
    return ask_after_random_shots(groups, left_out, missing_files(folder, [f"{name}.json" for name in SUBJECTS]))


def _items(path: Path, left_out: Counter[str]) -> Iterator[Item]:
    for number, row in enumerate(_rows(path)):
        question = row.filled("question").strip()
        gold = row.answers("answer" if "answer" in row.values else "standard_answer", "ABCDEFG")
        if not gold:
            raise ValueError(f"{row.where}: no answer is given.")
        if len(gold) > 1:
            left_out["more than one right answer"] += 1
        elif not _has_four_options(question) or gold[0] > 3:
            left_out["not four options, A to D, in the question's text"] += 1
        else:
            yield Item(f"{path.stem}/{number}", question, (), gold[0], letters="ABCD")


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
        "The paper's random partition of the questions is not published, so its figure can't be reproduced exactly: "
        f"here five questions of each subject, chosen with the seed {SEED}, are the shots, and all others are asked.",
        "The prompt is C-Eval's, which the paper calls similar; the options are part of the question's text.",
        "The benchmark's own metric is exam points; this is accuracy, as in the paper.",
    ),
)
