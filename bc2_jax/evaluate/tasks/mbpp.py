"""MBPP: short Python functions, written from one sentence and three tests."""

from __future__ import annotations

from pathlib import Path

from bc2_jax.evaluate.task import Example, Loaded, Task
from bc2_jax.evaluate.tasks.reading import Row, find_file, read_rows
from bc2_jax.validation import choices, show

SHOTS = (2, 3, 4)  # their task_id
TESTED = range(11, 511)  # the task_id of the test split
_SOURCE = (
    "mbpp.jsonl, JSON lines with task_id, text, code, test_list and test_setup_code, from mbpp/ of "
    "github.com/google-research/google-research, in DATA_DIR/mbpp; sanitized-mbpp.json is another set."
)


def load(data_dir: Path) -> Loaded:
    """Tasks 11 to 510 after tasks 2 to 4; line ends of the code (CRLF as released) are kept."""
    path = find_file(data_dir, ("mbpp",), ("", "data"), ("mbpp.jsonl", "mbpp.json"), _SOURCE)
    rows: dict[int, Row] = {}
    for row in read_rows(path, needed=("task_id", "text", "code", "test_list")):
        number = row.values["task_id"]
        if not isinstance(number, int) or isinstance(number, bool) or number in rows:
            raise ValueError(f"{row.where}: 'task_id' is {show(number)}; it must be a whole number, each once.")
        rows[number] = row
    missing = [number for number in SHOTS if number not in rows]
    if missing:
        raise ValueError(f"{path} lacks task {choices(missing)}, which are shots: {_SOURCE}")
    shots = tuple(_show(rows[number]) for number in SHOTS)
    found = [number for number in TESTED if number in rows]
    if not found:
        raise ValueError(f"{path} has no task with a task_id in {TESTED[0]}-{TESTED[-1]}: {_SOURCE}")
    examples = [
        Example(
            str(number), "mbpp", f"{_ask(rows[number])}[BEGIN]\n", shots=shots,
            facts={"setup": str(rows[number].values.get("test_setup_code") or ""), "tests": _tests(rows[number])},
        )
        for number in found
    ]  # fmt: skip
    short = [f"{path} has {len(found)} tasks to test instead of {len(TESTED)}."] if len(found) < len(TESTED) else []
    others = len(rows.keys() - set(TESTED) - set(SHOTS))
    return Loaded(examples, {"tasks of other splits": others} if others else {}, tuple(short))


def _tests(row: Row) -> list[str]:
    tests = row.values["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{row.where}: 'test_list' is {show(tests)}; it must be a list of texts.")
    return tests


def _ask(row: Row) -> str:
    tests = "\n ".join(_tests(row))
    return (
        f"You are an expert Python programmer, and here is your task: {row.filled('text')} Your code should pass these "
        f"tests:\n\n {tests}  \n\n"
    )


def _show(row: Row) -> str:
    return f"{_ask(row)}[BEGIN]\n '{row.filled('code').rstrip()}' \n[DONE] \n\n \n"


def extract(text: str) -> str:
    """The code of an answer: up to [DONE], without the quotes around it that the shots have."""
    code = text.partition("[DONE]")[0].strip().removeprefix("[BEGIN]").strip()
    if code.startswith("'") and not code.startswith("'''"):
        code = code[1:].removesuffix("'")
    return code.strip()


def program(example: Example, text: str) -> tuple[str, str]:
    """The code; its setup code and tests."""
    return extract(text) + "\n", "\n".join([example.facts["setup"], *example.facts["tests"]]) + "\n"


TASK = Task(
    name="mbpp",
    title="MBPP",
    source=_SOURCE,
    kind="code",
    shots=len(SHOTS),
    load=load,
    paper={"7B": 24.20, "13B": 30.20},
    paper_source="Table 6, 3 shots by OpenCompass",
    notes=(
        "The wording is that of OpenCompass's mbpp_gen_1e1056, with regular spacing of the tests in the shots. "
        "test_setup_code, which few tasks have, is run before the tests; OpenCompass leaves it out.",
    ),
    stops=("[DONE]",),
    max_new_tokens=512,
    program=program,
)
