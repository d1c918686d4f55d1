"""HumanEval: complete Python functions from their docstrings; tests decide."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bc2_jax.evaluate.task import Example, Loaded, Task
from bc2_jax.evaluate.tasks.reading import find_file, read_rows

ITEMS = 164
INSTRUCTION = "Complete the following python code:\n"
_FIELDS = ("task_id", "prompt", "entry_point", "test")
_SOURCE = (
    "HumanEval.jsonl.gz or HumanEval.jsonl, JSON lines with task_id, prompt, entry_point, canonical_solution and test, "
    "from data/ of github.com/openai/human-eval, in DATA_DIR/humaneval."
)


def load(data_dir: Path, instruction: str = "") -> Loaded:
    """The functions to complete, after `instruction`."""
    files = ("HumanEval.jsonl", "human-eval-v2-20210705.jsonl", "test-00000-of-00001.parquet")
    inner = ("", "data", "openai_humaneval")
    path = find_file(data_dir, ("humaneval", "human-eval", "openai_humaneval"), inner, files, _SOURCE)
    examples = [
        Example(
            row.filled("task_id"), "humaneval", instruction + row.filled("prompt"),
            facts={name: row.filled(name) for name in ("prompt", "entry_point", "test")},
        )
        for row in read_rows(path, needed=_FIELDS)
    ]  # fmt: skip
    count = len(examples)
    return Loaded(examples, notes=(f"{path} has {count} functions instead of {ITEMS}.",) if count != ITEMS else ())


def program(example: Example, text: str) -> tuple[str, str]:
    """The completed function, and its tests. The completion keeps its leading spaces, which indent the body."""
    facts = example.facts
    return facts["prompt"] + text, f"{facts['test']}\ncheck({facts['entry_point']})\n"


def _make(name: str, title: str, instruction: str, config: str) -> Task:
    return Task(
        name=name,
        title=title,
        source=_SOURCE,
        kind="code",
        shots=0,
        load=partial(load, instruction=instruction),
        paper={"7B": 18.29, "13B": 17.07},
        paper_source="Table 6, 0 shots by OpenCompass",
        notes=(
            "The paper does not say which of OpenCompass's two prompts it used: the bare function "
            "(humaneval_gen_a82cae, here humaneval) or after 'Complete the following python code:' "
            f"(humaneval_gen_8e312c, here humaneval_instruction). This is {config}. One greedy completion each, cut "
            "where a new top-level statement begins. OpenCompass also strips leading spaces, which breaks the "
            "indentation, and cuts code fences.",
        ),
        stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_new_tokens=512,
        program=program,
    )


TASK = _make("humaneval", "HumanEval", "", "humaneval_gen_a82cae")
INSTRUCTED = _make("humaneval_instruction", "HumanEval, with an instruction", INSTRUCTION, "humaneval_gen_8e312c")
