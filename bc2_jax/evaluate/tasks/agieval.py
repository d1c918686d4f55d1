"""AGIEval: exam questions in Chinese and English, those with one right answer of four."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import CEVAL, MMLU, SEED, SHOTS, Group, Item, ask_after_random_shots
from bc2_jax.evaluate.tasks.reading import Row, find_folder, missing_files, read_rows
from bc2_jax.validation import show

CHINESE = {
    "gaokao-biology": "高考生物", "gaokao-chemistry": "高考化学", "gaokao-chinese": "高考语文",
    "gaokao-geography": "高考地理", "gaokao-history": "高考历史", "gaokao-mathqa": "高考数学",
    "gaokao-physics": "高考物理", "logiqa-zh": "公务员逻辑推理",
}  # fmt: skip
ENGLISH = {
    "gaokao-english": "English", "logiqa-en": "logical reasoning", "sat-en": "SAT English",
    "sat-en-without-passage": "SAT English", "sat-math": "SAT mathematics",
}  # fmt: skip
OTHERS = {
    **dict.fromkeys(("aqua-rat", "lsat-ar", "lsat-lr", "lsat-rc"), "five options"),
    **dict.fromkeys(("jec-qa-ca", "jec-qa-kd"), "JEC-QA, where several answers may be right"),
    **dict.fromkeys(("gaokao-mathcloze", "math"), "no options"),
}
"""Files of other kinds of questions -> why they are left out."""
SOURCE = (
    "gaokao-biology.jsonl, logiqa-en.jsonl, sat-math.jsonl and so on, JSON lines with passage, question, options, "
    "label, as in data/v1 of github.com/ruixiangcui/AGIEval, in DATA_DIR/agieval."
)
_MARK = re.compile(r"\s*(?:[(（]([A-E])[)）]|([A-E])[\s.．、])\s*")


def load(data_dir: Path) -> Loaded:
    """Of each file five random questions as shots, and the others."""
    subjects = CHINESE | ENGLISH
    folder = find_folder(
        data_dir, ("agieval", "AGIEval-main"), ("data/v1", "v1", "", "data/v1_1", "v1_1"),
        lambda place: any((place / f"{name}.jsonl").is_file() for name in subjects), SOURCE,
    )  # fmt: skip
    left_out, broken = Counter[str](), list[str]()
    for name, reason in OTHERS.items():
        if (path := folder / f"{name}.jsonl").is_file():
            left_out[reason] += sum(1 for _ in read_rows(path, broken=broken))
    groups = [
        Group(name, subject, CEVAL if name in CHINESE else MMLU, list(_items(path, left_out, broken)))
        for name, subject in subjects.items()
        if (path := folder / f"{name}.jsonl").is_file()
    ]
    left_out["not JSON, as the benchmark released it"] += len(broken)
    loaded = ask_after_random_shots(groups, left_out, missing_files(folder, [f"{name}.jsonl" for name in subjects]))
    return loaded._replace(notes=(*loaded.notes, *(f"{line}: it is left out." for line in broken)))


def _items(path: Path, left_out: Counter[str], broken: list[str]) -> Iterator[Item]:
    for number, row in enumerate(read_rows(path, needed=("question", "options", "label"), broken=broken)):
        item = _item(row, f"{path.stem}/{number}")
        if isinstance(item, str):
            left_out[item] += 1
        else:
            yield item


def _item(row: Row, name: str) -> Item | str:
    """A question, or why it is left out."""
    options = row.values["options"]
    if not options:
        return "no options"
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{row.where}: 'options' is {show(options)}; it must be a list of texts.")
    gold = row.answers("label", "ABCDEFG")
    if len(gold) > 1:
        return "more than one right answer"
    if len(options) != 4:  # other numbers than five are errors of the release
        return "five options" if len(options) == 5 else "neither four nor five options"
    if not gold or gold[0] > 3:
        raise ValueError(f"{row.where}: 'label' is {show(row.values['label'])}; it must be one of A, B, C, D.")
    passage = row.values.get("passage")
    question = f"{passage}\n{row.filled('question')}" if passage else row.filled("question")
    return Item(name, question, _without_marks(options), gold[0])


def _without_marks(options: list[str]) -> tuple[str, ...]:
    """The options without their leading letters, if all have one: "(A)", or "A" in some of logiqa-zh."""
    marks = [_MARK.match(option) for option in options]
    if "".join((mark[1] or mark[2]) if mark else "" for mark in marks) != "ABCD":
        return tuple(options)
    return tuple(option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark)


TASK = Task(
    name="agieval",
    title="AGIEval",
    source=SOURCE,
    kind="letters",
    shots=SHOTS,
    load=load,
    paper={"7B": 42.73, "13B": 48.17},
    paper_source="Table 1 and README",
    notes=(
        "The paper's random partition of the questions is not published, so its figure can't be reproduced exactly: "
        f"here five questions of each file, chosen with the seed {SEED}, are the shots, and all others are asked.",
        "The paper says its prompt is like C-Eval's; Chinese questions use C-Eval's here, English ones MMLU's.",
        "Some rows of data/v1 are not JSON or lack an option: they are left out and counted.",
        "data/v1_1 of the benchmark has corrected questions; data/v1, which the paper used, is preferred.",
    ),
)
