"""GSM8K: word problems of grade-school arithmetic, answered in steps."""

from __future__ import annotations

import re
from pathlib import Path

from bc2_jax.align.checkable import last_number
from bc2_jax.evaluate.task import Example, Loaded, Task, Verdict
from bc2_jax.evaluate.tasks.reading import SHOTS_FILE, Row, find_file, read_rows, read_shots

SHOTS = 4
LONGEST_SHOT = 400  # characters of the solution of a training problem used as a shot
_FIELDS = ("question", "answer")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_SOURCE = (
    "test.jsonl (and train.jsonl for the shots, or shots.txt), JSON lines with question and answer, whose last line is "
    "'#### NUMBER', from grade_school_math/data of github.com/openai/grade-school-math, in DATA_DIR/gsm8k."
)


def load(data_dir: Path) -> Loaded:
    """The test problems after 4 worked examples: of shots.txt, else the first short ones of train.jsonl."""
    names, inner = ("gsm8k", "grade-school-math", "grade_school_math"), ("", "grade_school_math/data", "data", "main")
    test = find_file(data_dir, names, inner, ("test.jsonl", "test-00000-of-00001.parquet"), _SOURCE)
    shots, note = _find_shots(test)
    examples = [
        Example(str(number), "gsm8k", _ask(row.filled("question")), shots=shots, target=_final(row))
        for number, row in enumerate(read_rows(test, needed=_FIELDS))
    ]
    return Loaded(examples, notes=(note,))


def _find_shots(test: Path) -> tuple[tuple[str, ...], str]:
    own = test.with_name(SHOTS_FILE)
    if own.is_file():
        _, texts = read_shots(own, "Question:", "Answer:", SHOTS)
        return tuple(f"{text}\n\n" for text in texts), f"Shots: the first {SHOTS} of {own}."
    names = [test.name.replace("test", "train", 1), "train.jsonl", "train.jsonl.gz"]
    train = next((test.with_name(name) for name in names if test.with_name(name).is_file()), None)
    if train is None:
        raise FileNotFoundError(
            f"The shots of GSM8K are missing: {own} (worked examples as text, each 'Question: ...', 'Let's think step "
            "by step', 'Answer:' and the solution), or train.jsonl beside the test file."
        )
    shots: list[str] = []
    for row in read_rows(train, needed=_FIELDS):
        solution = _CALCULATION.sub("", row.filled("answer")).rpartition("####")[0].strip()
        if len(solution) <= LONGEST_SHOT and len(shots) < SHOTS:
            shots.append(f"{_ask(row.filled('question'))}\n{solution}\nThe answer is {_final(row)}\n\n")
    if len(shots) < SHOTS:
        raise ValueError(f"{train} has {len(shots)} problems with a short solution; {SHOTS} are needed as shots.")
    return tuple(shots), (
        f"Shots: the first {SHOTS} problems of {train.name} with a solution of at most {LONGEST_SHOT} characters, not "
        f"OpenCompass's four; those are used if they are in {own}."
    )


def _ask(question: str) -> str:
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def _final(row: Row) -> str:
    """The number after ####, without thousands separators."""
    _, mark, number = row.text("answer").rpartition("####")
    if not mark or last_number(number) is None:
        raise ValueError(f"{row.where}: 'answer' must end in a line '#### NUMBER'.")
    return number.strip().replace(",", "")


def judge(example: Example, text: str) -> Verdict:
    """The last number before the next question; 5.0, $5 and 5,000 are read as numbers."""
    found = last_number(text.partition("Question:")[0])
    return Verdict(found is not None and found == last_number(example.target), "" if found is None else str(found))


TASK = Task(
    name="gsm8k",
    title="GSM8K",
    source=_SOURCE,
    kind="generation",
    shots=SHOTS,
    load=load,
    paper={"7B": 24.49, "13B": 52.77},
    paper_source="Table 6, 4 shots by OpenCompass; compare exact",
    notes=(
        "The paper only says 4 shots and OpenCompass. This is the wording of OpenCompass's gsm8k_gen_1d7fe4. Users who "
        "ran it report 18.73 instead of 52.77 for 13B (github.com/baichuan-inc/Baichuan2, issue 89, unanswered): a "
        "figure far from the paper's does not prove a broken checkpoint.",
    ),
    stops=("Question:",),
    max_new_tokens=512,
    judge=judge,
)
