"""MATH: competition problems, answered by a solution with the answer in a box."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.math_answers import NORMALIZER, find_answer, last_box, same_answer
from bc2_jax.evaluate.task import Example, Loaded, Task, Verdict
from bc2_jax.evaluate.tasks.reading import SHOTS_FILE, Row, find_folder, read_rows, read_shots

SHOTS = 4
TEST_ITEMS = 5000
LONGEST_SHOT = 400  # characters of the solution of a training problem used as a shot
_FIELDS = ("problem", "solution")
_SOURCE = (
    "test/CATEGORY/NUMBER.json (and train/... for the shots, or shots.txt), each a JSON object with problem, level, "
    "type and solution, as in MATH.tar of github.com/hendrycks/math, unpacked to DATA_DIR/math; or "
    "CATEGORY/test-*.parquet and CATEGORY/train-*.parquet of the Hugging Face dataset EleutherAI/hendrycks_math there."
)


def load(data_dir: Path) -> Loaded:
    """The test problems after 4 worked examples: of shots.txt, else short ones of the training problems."""
    names = ("math", "competition_math", "hendrycks_math")
    folder = find_folder(data_dir, names, ("", "MATH"), lambda place: _is_there(place, "test"), _SOURCE)
    problems = [(name, row, _boxed(row)) for name, row in _problems(folder, "test")]
    if not problems:
        raise FileNotFoundError(f"{folder / 'test'} holds no CATEGORY/NUMBER.json: {_SOURCE}")
    shots, note = _find_shots(folder)
    examples = [
        Example(
            name, name.partition("/")[0], f"Problem:\n{row.filled('problem')}\nSolution:", shots=shots, target=answer,
            facts={"level": str(row.values.get("level", ""))},
        )
        for name, row, answer in problems
    ]  # fmt: skip
    short = len(examples) != TEST_ITEMS
    return Loaded(examples, notes=(note, *([f"{len(examples)} problems instead of {TEST_ITEMS}."] if short else ())))


def _is_there(folder: Path, split: str) -> bool:
    return (folder / split).is_dir() or any(folder.glob(f"*/{split}-*.parquet"))


def _problems(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    """(CATEGORY/NUMBER, problem), by category and number."""
    for category, tables in itertools.groupby(sorted(folder.glob(f"*/{split}-*.parquet")), lambda path: path.parent):
        found = itertools.chain.from_iterable(read_rows(table, needed=_FIELDS) for table in tables)
        yield from ((f"{category.name}/{number}", row) for number, row in enumerate(found))
    for category in sorted(path for path in folder.glob(f"{split}/*") if path.is_dir()):
        files = [path for path in category.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: (not path.stem.isdecimal(), path.stem.zfill(9))):
            rows = list(read_rows(path, needed=_FIELDS))
            if len(rows) != 1:
                raise ValueError(f"{path} holds {len(rows)} objects; it must hold one problem.")
            yield f"{category.name}/{path.stem}", rows[0]


def _boxed(row: Row) -> str:
    answer = last_box(row.text("solution"))
    if not answer:
        raise ValueError(f"{row.where}: 'solution' has no answer in \\boxed{{}}.")
    return answer


def _find_shots(folder: Path) -> tuple[tuple[str, ...], str]:
    own = folder / SHOTS_FILE
    if own.is_file():
        _, texts = read_shots(own, "Problem:", "Solution:", SHOTS)
        return tuple(f"{text}\n\n" for text in texts), f"Shots: the first {SHOTS} of {own}."
    if not _is_there(folder, "train"):
        raise FileNotFoundError(
            f"The shots of MATH are missing: {own} (worked examples as text, each 'Problem:', the problem, 'Solution:' "
            f"and the solution), or the training problems in {folder / 'train'}."
        )
    # One of each category, so that the shots are not all of algebra.
    short: list[Row] = []
    for _, found in itertools.groupby(_problems(folder, "train"), key=lambda pair: pair[0].partition("/")[0]):
        if len(short) < SHOTS:
            short += list(itertools.islice((row for _, row in found if _is_short(row)), 1))
    if len(short) < SHOTS:
        raise ValueError(f"{folder / 'train'} has {len(short)} categories with a short solution; {SHOTS} are needed.")
    shots = [f"Problem:\n{row.text('problem')}\n\nSolution:\n{_solution(row)}\n\n" for row in short]
    return tuple(shots), (
        f"Shots: of each of the first {SHOTS} training categories the first problem with a solution of at most "
        f"{LONGEST_SHOT} characters and no drawing, not Minerva's four; those are used if they are in {own}."
    )


def _is_short(row: Row) -> bool:
    problem, solution = row.text("problem"), row.text("solution")
    return len(solution) <= LONGEST_SHOT and "[asy]" not in problem + solution and bool(last_box(solution))


def _solution(row: Row) -> str:
    """With the closing sentence of Minerva's examples."""
    return (
        f"{row.text('solution').strip()}\n"
        f"Final Answer: The final answer is ${_boxed(row)}$. I hope it is correct."
    )  # fmt: skip


def judge(example: Example, text: str) -> Verdict:
    """The last box, or the text after the last "answer is"; compared by the rules of `math_answers`."""
    answer = find_answer(text)
    return Verdict(same_answer(answer, example.target), answer)


TASK = Task(
    name="math",
    title="MATH",
    source=_SOURCE,
    kind="generation",
    shots=SHOTS,
    load=load,
    paper={"7B": 5.58, "13B": 10.08},
    paper_source="Table 6, 4 shots by OpenCompass; compare exact",
    notes=(
        f"Answers are compared as strings after this package's rules {NORMALIZER} (docs/benchmarks.md); other scripts "
        "differ by up to several points, and the paper does not say which it used. The wording is OpenCompass's "
        "math_4shot_base_gen_db136b.",
    ),
    stops=("Problem:",),
    max_new_tokens=1024,
    judge=judge,
)
