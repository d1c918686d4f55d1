"""JEC-QA: questions of the Chinese National Judicial Examination; those with one right answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import CEVAL, SEED, SHOTS, Group, Item, ask_after_random_shots
from bc2_jax.evaluate.tasks.reading import find_folder, read_rows

FILES = ("0_train.json", "1_train.json", "train.json", "0_test.json", "1_test.json", "test.json")
SOURCE = (
    "0_train.json and 1_train.json (0_test.json and 1_test.json have no answers), JSON lines with id, statement, "
    "option_list {A, B, C, D}, answer [letters], type, subject, as jecqa.thunlp.org sends them, in DATA_DIR/jecqa."
)
_KINDS = {"0": "knowledge", "1": "analysis of cases"}


def load(data_dir: Path) -> Loaded:
    """Of each kind five random questions as shots, and the others."""
    folder = find_folder(
        data_dir, ("jecqa", "JEC-QA"), ("", "data", "JEC-QA"),
        lambda place: any((place / name).is_file() for name in _names(FILES[:3])), SOURCE,
    )  # fmt: skip
    groups, left_out = defaultdict(list), Counter[str]()
    paths = [path for path in (folder / name for name in _names(FILES)) if path.is_file()]
    for path in paths:
        for number, row in enumerate(read_rows(path, needed=("statement", "option_list"))):
            options = row.options("option_list")
            gold = row.answers("answer", "ABCDEFGH"[: len(options)])
            if not gold:
                left_out["answer not published"] += 1
            elif len(gold) > 1:
                left_out["more than one right answer"] += 1
            elif len(options) != 4:
                left_out["not four options"] += 1
            else:
                item = Item(f"{path.stem}/{number}", row.filled("statement"), options, gold[0])
                kind = str(row.values.get("type", path.name[0]))
                groups[_KINDS.get(kind, "of no kind")].append(item)
    notes = [f"No questions of the kind {kind!r} are in {folder}." for kind in _KINDS.values() if kind not in groups]
    asked = [Group(kind, "国家司法", CEVAL, items) for kind, items in sorted(groups.items())]
    return ask_after_random_shots(asked, left_out, notes)


def _names(names: tuple[str, ...]) -> list[str]:
    """The same, with .jsonl too."""
    return [other for name in names for other in (name, f"{name}l")]


TASK = Task(
    name="jecqa",
    title="JEC-QA",
    source=SOURCE,
    kind="letters",
    shots=SHOTS,
    load=load,
    paper={"7B": 44.46, "13B": 47.40},
    paper_source="README (law and medicine)",
    notes=(
        "The answers of the test files are not published, and the paper does not say which questions it asked or used "
        "as shots, so its figure can't be reproduced exactly: here five questions of each of the two kinds of the "
        f"training files, chosen with the seed {SEED}, are the shots, and all others are asked.",
        "The prompt is C-Eval's, which the paper calls similar, with 国家司法 as the subject.",
    ),
)
