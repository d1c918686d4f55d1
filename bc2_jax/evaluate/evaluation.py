"""Evaluates a model on disk on benchmarks, with all results in one folder."""

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
from bc2_jax.evaluate.records import NAME, read_records, write_json, write_parquet
from bc2_jax.evaluate.results import Results
from bc2_jax.evaluate.runner import DEFAULT, RESULTS, Say, Way, run_task
from bc2_jax.evaluate.scorer import Scorer, ScorerStats
from bc2_jax.files import lock
from bc2_jax.tokenizer import Tokenizer


class Evaluated(NamedTuple):
    about: dict[str, Any]  # the content of evaluation.json
    results: list[Results]
    stats: ScorerStats | None  # none if nothing was asked


def load_scorer(model: Model, mesh: Mesh | None, **options: Any) -> Scorer:
    """The model and its tokenizer on a mesh; `options` are those of `Scorer`. Raises as `load_pretrained`."""
    adapted: dict[str, Any] = {} if model.adapter is None else {"adapter": model.adapter}
    loaded = load_pretrained(model.path, dtype=model.dtype, mesh=mesh, **adapted)
    return Scorer(loaded, Tokenizer(model.tokenizer_path), max_length=model.max_length, **options)


def evaluate_model(
    model: Model, asked: Sequence[Questions], out: Path, mesh: Mesh | None = None, way: Way = DEFAULT,
    say: Say = lambda name, done, count: None, *, parquet: bool = False, **options: Any,
) -> Evaluated:  # fmt: skip
    """Asks what OUT has no records of; writes OUT/TASK/records.jsonl, OUT/TASK/results.json and OUT/results.json.

    The weights are loaded only if something is missing, or to check that the records are of this model. `options` are
    those of `Scorer`. All processes call it, on a shared file system. Raises InUse if another program evaluates into
    OUT, and ValueError as `claim`, `settle` and `run_task`.
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

    with _locked(out):
        if not first_decides(lambda: claim(out, about, asked)):
            load()
        results = [run_task(questions, load, out / questions.task.name, way, say) for questions in asked]
        if parquet:
            first_decides(lambda: _write_parquet(out, asked))
        return Evaluated(first_decides(lambda: _collect(out)), results, scorers[0].stats if scorers else None)


def _collect(out: Path) -> dict[str, Any]:
    """Writes OUT/results.json, the results of all benchmarks in OUT; returns the identity of the model."""
    about = read_identity(out)
    assert about is not None  # claim wrote it
    model = {k: v for k, v in about.items() if k != "tasks"}
    write_json(out / RESULTS, {"model": model, "tasks": read_results(out)})
    return about


def read_results(out: Path) -> dict[str, Results]:
    """Benchmark -> its results in OUT. Raises ValueError for a damaged file."""
    found = {}
    for path in sorted(out.glob(f"*/{RESULTS}")):
        if not path.with_name(NAME).is_file():
            continue  # a checkpoint's or lm-eval's folder
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
def _locked(out: Path) -> Iterator[None]:
    """Locks OUT against other programs. Raises InUse, on all processes, if one has it."""
    with contextlib.ExitStack() as stack:
        first_decides(lambda: stack.enter_context(lock(out / ".lock", f"--out = '{out}'")))
        yield
