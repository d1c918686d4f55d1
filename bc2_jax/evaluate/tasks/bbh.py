"""BBH: 27 hard tasks of BIG-Bench, answered after three worked examples with reasoning (chain of thought)."""

from __future__ import annotations

import re
from pathlib import Path

from bc2_jax.evaluate.task import Example, Loaded, Task, Verdict, groups_first
from bc2_jax.evaluate.tasks.reading import Row, find_folder, read_rows, read_shots, require_file
from bc2_jax.validation import choices, show

SHOTS = 3
NAMES = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip
_LETTER = re.compile(r"\(([A-Z])\)")
_HEADER = "Follow the given examples and answer the question.\n"
_SOURCE = (
    "bbh/TASK.json ({\"examples\": [{input, target}, ...]}, or such objects as a list or as lines) and "
    "cot-prompts/TASK.txt for each of 27 tasks, as in github.com/suzgunmirac/BIG-Bench-Hard, in DATA_DIR/bbh."
)  # fmt: skip


def load(data_dir: Path) -> Loaded:
    """All 27 tasks, each after the three examples of its file in cot-prompts."""
    folder = find_folder(
        data_dir, ("bbh", "BIG-Bench-Hard"), ("", "BBH"), lambda place: _find_prompts(place) is not None, _SOURCE
    )
    prompts = _find_prompts(folder)
    assert prompts is not None  # find_folder checked it
    examples = []
    for name in NAMES:
        header, shots = _prompt(require_file(prompts / f"{name}.txt", f"the worked examples of {name} ({_SOURCE})"))
        for number, row in enumerate(_items(_find_items(folder, name))):
            question, target = f"Q: {row.filled('input')}\nA: Let's think step by step.", row.filled("target").strip()
            examples.append(Example(f"{name}/{number}", name, question, header, shots, target=target))
    return Loaded(examples)


def _find_prompts(folder: Path) -> Path | None:
    places = (folder / name for name in ("cot-prompts", "lib_prompt"))
    return next((place for place in places if place.is_dir()), None)


def _find_items(folder: Path, name: str) -> Path:
    places = [
        folder / part / f"{name}{ending}" for part in ("bbh", "data", "") for ending in (".json", ".jsonl", ".json.gz")
    ]
    places.append(folder / name / "test-00000-of-00001.parquet")
    found = next((path for path in places if path.is_file()), None)
    return found or require_file(places[0], f"the items of {name} ({_SOURCE})")


def _items(path: Path) -> list[Row]:
    rows = list(read_rows(path))
    if len(rows) == 1 and isinstance(rows[0].values.get("examples"), list):
        rows = [Row(value, f"{path} (example {n})") for n, value in enumerate(rows[0].values["examples"], 1)]
    for row in rows:
        if not isinstance(row.values, dict) or not {"input", "target"} <= row.values.keys():
            raise ValueError(
                f"{row.where} is {show(row.values)}: it must be an object with {choices(['input', 'target'])}."
            )
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows


def _prompt(path: Path) -> tuple[str, tuple[str, ...]]:
    """Header and shots, without the warning against training on the file that a line of dashes ends."""
    before, shots = read_shots(path, "Q:", "A:", SHOTS)
    about = re.split(r"^-{3,}\s*$", before, flags=re.MULTILINE)[-1].strip()
    return f"{_HEADER}{about}\n\n", tuple(f"{shot}\n\n" for shot in shots)


def judge(example: Example, text: str) -> Verdict:
    """The text after the first "answer is": a letter if the reference is one such as (B), else the rest of the line."""
    _, found, answer = text.partition("answer is ")
    if _LETTER.fullmatch(example.target):
        match = _LETTER.search(answer if found else text) or re.search(r"\b([A-Z])\b", answer)
        answer = f"({match[1]})" if match else ""
    else:
        answer = (answer if found else text).strip().split("\n")[0].strip()
        bold = re.search(r"\*\*(.+?)\*\*", answer)
        answer = bold[1] if bold else answer.removesuffix(".").strip()
    return Verdict(answer == example.target, answer)


TASK = Task(
    name="bbh",
    title="BBH",
    source=_SOURCE,
    kind="generation",
    shots=SHOTS,
    load=load,
    paper={"7B": 41.56, "13B": 48.78},
    paper_source="Table 1, 3 shots; compare exact, mean of groups",
    notes=(
        "The paper only says 3 shots. Worked examples, wording, answer extraction and the mean over tasks are "
        "OpenCompass's (bbh_gen_5b92b0). Generation ends at a line that begins with 'Q:'; lm-eval's ends at any 'Q'.",
    ),
    summarize=groups_first,
    stops=("\nQ:",),
    max_new_tokens=512,
    judge=judge,
)
