"""MedQA: medical examinations of the United States (USMLE) and of China (MCMLE), with five options."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import CEVAL, MMLU, SEED, SHOTS, Item, Wording, choose, make_examples, too_few
from bc2_jax.evaluate.tasks.reading import Row, find_folder, read_rows, require_file

_NOTES = (
    f"The paper does not say which questions were its shots: here five of the dev split, chosen with the seed {SEED}.",
    "The version with four options gives higher figures: it is refused.",
)


def source(folder: str) -> str:
    return (
        f"{folder}/test.jsonl and {folder}/dev.jsonl, JSON lines with question, options {{A, B, C, D, E}}, answer, "
        f"answer_idx, as in data_clean/questions of the archive that github.com/jind11/MedQA links to, in "
        f"DATA_DIR/medqa (not {folder}/4_options)."
    )


def load(data_dir: Path, part: str, wording: Wording, subject: str) -> Loaded:
    """Items of test after five random ones of dev."""
    folder = find_folder(
        data_dir, ("medqa", "med_qa", "data_clean"), (f"questions/{part}", f"data_clean/questions/{part}", part),
        lambda place: (place / "test.jsonl").is_file(), source(part),
    )  # fmt: skip
    dev = require_file(folder / "dev.jsonl", f"it holds the shots; {source(part)}")
    shots = choose(_items(dev)[0], SHOTS)
    items, left_out = _items(folder / "test.jsonl")
    return Loaded(make_examples(items, shots, wording, subject, part), left_out, tuple(too_few(shots, dev)))


def _items(path: Path) -> tuple[list[Item], Counter[str]]:
    items, left_out = [], Counter[str]()
    for number, row in enumerate(read_rows(path, needed=("question", "options"))):
        options = row.options("options")
        if len(options) != 5:
            left_out[f"{len(options)} options instead of five"] += 1
        else:
            items.append(Item(f"{path.stem}/{number}", row.filled("question"), options, _gold(row, options)))
    if not items:
        raise ValueError(f"{path} holds no question with five options: {', '.join(left_out)}; it is another version.")
    return items, left_out


def _gold(row: Row, options: tuple[str, ...]) -> int:
    if row.values.get("answer_idx") is not None:
        return row.letter("answer_idx", "ABCDE")
    answer = row.filled("answer")
    if options.count(answer) != 1:
        raise ValueError(f"{row.where}: 'answer' is {answer!r}, which is not one of the options.")
    return options.index(answer)


USMLE = Task(
    name="medqa_usmle",
    title="MedQA USMLE (five options)",
    source=source("US"),
    kind="letters",
    shots=SHOTS,
    load=partial(load, part="US", wording=MMLU, subject="medicine"),
    paper={"7B": 32.68, "13B": 40.38},
    paper_source="README (law and medicine)",
    notes=(*_NOTES, "The paper says its prompt is like C-Eval's; here it is MMLU's, in English."),
)
MCMLE = Task(
    name="medqa_mcmle",
    title="MedQA MCMLE (five options)",
    source=source("Mainland"),
    kind="letters",
    shots=SHOTS,
    load=partial(load, part="Mainland", wording=CEVAL, subject="医师资格"),
    paper={"7B": 54.93, "13B": 61.62},
    paper_source="README (law and medicine)",
    notes=(*_NOTES, "The prompt is C-Eval's, which the paper calls similar, with 医师资格 as the subject."),
)
