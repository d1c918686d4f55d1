"""A model on disk put to benchmarks, all of whose results are in one folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bc2_jax.agreement import first_decides
from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.evaluate.asking import Questions
from bc2_jax.evaluate.identity import Model, checksum_of, claim, read_identity, settle
from bc2_jax.evaluate.records import NAME, read_records, write_parquet
from bc2_jax.evaluate.runner import DEFAULT, RESULTS, Results, Say, Way, run_task, write_json
from bc2_jax.evaluate.scorer import Scorer, ScorerStats
from bc2_jax.files import lock
from bc2_jax.tokenizer import Tokenizer


class Evaluated(NamedTuple):
    """What came out."""

    about: dict[str, Any]
    """What `identity.claim` wrote."""
    results: list[Results]
    stats: ScorerStats | None
    """None where all was there already."""


def load_scorer(model: Model, mesh: Mesh | None, **options: Any) -> Scorer:
    """The model on a mesh, ready to be asked; `options` are those of `Scorer`. Raises as `load_pretrained`."""
    adapted: dict[str, Any] = {} if model.adapter is None else {"adapter": model.adapter}
    loaded = load_pretrained(model.path, dtype=model.dtype, mesh=mesh, **adapted)
    return Scorer(loaded, Tokenizer(model.tokenizer_path), max_length=model.max_length, **options)


def evaluate_model(
    model: Model, asked: Sequence[Questions], out: Path, mesh: Mesh | None = None, way: Way = DEFAULT,
    say: Say = lambda name, done, count: None, *, parquet: bool = False, **options: Any,
) -> Evaluated:  # fmt: skip
    """Asks a model what OUT has no records of yet, and writes OUT/TASK/records.jsonl and results.json of each benchmark
    and OUT/results.json of all.

    The weights are read only if something is missing, or to tell whether this is the model that the records are of.
    `options` are those of `Scorer`. Processes of several hosts share the file system; all call it. Raises InUse if
    another program evaluates into OUT, and ValueError as `claim`, `settle` and `run_task`.
    """
    about = first_decides(model.describe)
    scorers: list[Scorer] = []

    def load() -> Scorer:
        if not scorers:
            scorer = load_scorer(model, mesh, **options)
            found = checksum_of(scorer.model)
            first_decides(lambda: settle(out, about, found))
            scorers.append(scorer)
        return scorers[0]

    with owned(out):
        if not first_decides(lambda: claim(out, about, asked)):
            load()
        results = [run_task(questions, load, out / questions.task.name, way, say) for questions in asked]
        if parquet:
            first_decides(lambda: _write_parquet(out, asked))
        return Evaluated(first_decides(lambda: collect(out)), results, scorers[0].stats if scorers else None)


def collect(out: Path) -> dict[str, Any]:
    """Writes OUT/results.json, the results of all benchmarks that OUT has; returns what they are of."""
    about = read_identity(out)
    assert about is not None  # claim wrote it
    tasks = read_results(out)
    write_json(out / RESULTS, {"model": {k: v for k, v in about.items() if k != "tasks"}, "tasks": tasks})
    return about


def read_results(out: Path) -> dict[str, Results]:
    """Benchmark -> its results in OUT. Raises ValueError for a file that is damaged.

    Other folders in OUT, of checkpoints or of lm-eval, have no records.
    """
    found = {}
    for path in sorted(out.glob(f"*/{RESULTS}")):
        if not path.with_name(NAME).is_file():
            continue
        try:
            results = json.loads(path.read_bytes())
            found[results["task"]] = results
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged: evaluate again, which rewrites it.") from None
    return found


def _write_parquet(out: Path, asked: Sequence[Questions]) -> None:
    for questions in asked:
        path = out / questions.task.name / NAME
        write_parquet(path.with_suffix(".parquet"), read_records(path))


@contextlib.contextmanager
def owned(out: Path) -> Iterator[None]:
    """No other program evaluates into OUT until the block ends. Raises InUse, on all processes, if one does."""
    with contextlib.ExitStack() as stack:

        def own() -> None:
            stack.enter_context(lock(out / ".lock", f"--out = '{out}'"))

        first_decides(own)
        yield
