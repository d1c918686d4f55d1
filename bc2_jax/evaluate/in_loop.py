"""Benchmarks during training, as metrics of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bc2_jax.config import RLConfig, RunConfig, TrainConfig
from bc2_jax.evaluate.asking import Questions, ask, parts_of, read_questions
from bc2_jax.evaluate.records import Record
from bc2_jax.evaluate.results import summarize
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.metadata import is_permanent
from bc2_jax.model.baichuan import Params
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.job import Job, Progress
from bc2_jax.train.loop import Start
from bc2_jax.validation import require

_AT_ONCE = 64  # items between checks for a stop signal


def with_tasks(config: RunConfig, start: Start, job: Job) -> Job:
    """Adds the benchmarks of `config.evaluate` to `job`: every `every` steps, at permanent checkpoints and at the end.

    Raises ValueError for a job without a language model, as `read_questions`, and for benchmarks that need more than
    the model: code to run, a user's judge or unpublished answers.
    """
    asked = config.evaluate
    build = job.language_model
    legal = "this kind of run has no language model to ask"
    require(build is not None, "evaluate.tasks", asked.tasks, legal)
    assert build is not None
    questions = read_questions(asked.names, Path(str(asked.data_dir)), limit=asked.limit or None, shots=asked.shots)
    for one in questions:
        problem = _why_not(one)
        require(not problem, "evaluate.tasks", asked.tasks, f"{one.task.name} {problem}; ask it by tools/evaluate.py")
    assert isinstance(config, TrainConfig | RLConfig)  # the kinds of run that train a language model
    tokenizer = Tokenizer(config.data.tokenizer if isinstance(config, TrainConfig) else config.tokenizer)
    first, before = start.step, 0 if start.metadata is None else start.metadata.tokens

    def is_due(step: int) -> bool:
        tokens = before + (step - first) * config.tokens_per_step
        return (
            step % (asked.every or config.eval_every) == 0 or step == config.num_steps
            or is_permanent(config.checkpoint, step, tokens, config.tokens_per_step)
        )  # fmt: skip

    def examine(step: int, params: Params, progress: Progress) -> dict[str, float] | None:
        values = {} if job.examine is None else job.examine(step, params, progress)
        if values is None or not is_due(step):
            return values
        found = ask_all(questions, Scorer(build(params), tokenizer), progress)
        if found is None:
            return None
        start.say(f"step {step}  {describe(questions, found)}")
        return values | found

    return job._replace(examine=examine)


def _why_not(questions: Questions) -> str:
    """Why a run can't report a figure of a benchmark, "" if it can."""
    task = questions.task
    if task.kind == "code":
        return "is judged by running code, which a run does not do"
    if task.kind == "generation":
        return "" if task.judge is not None else "needs a judge of yours, which a run does not have"
    return "" if any(example.gold for example in questions.examples) else "has answers that are not published"


def ask_all(questions: Sequence[Questions], scorer: Scorer, progress: Progress) -> dict[str, float] | None:
    """TASK_accuracy (TASK_score if it is not a share) and its _stderr of each benchmark; for choices TASK_gold_nats,
    which differs between models before accuracy does; TASK_shortened, the share of prompts cut or without some shots,
    if any. None if `progress` stops it."""
    metrics: dict[str, float] = {}
    for one in questions:
        name, records = one.task.name, list[Record]()
        for part in parts_of(one.examples, _AT_ONCE):
            records += ask(one.task, part, scorer)
            if not progress(f"{name}: item {len(records)} of {len(one.examples)}"):
                return None
        results = summarize(one, records)
        headline = results["metrics"][results["headline"]]
        # Shares are in 0..1, as the accuracy of held-out batches; BLEU stays in points.
        kind, unit = ("accuracy", 100) if one.task.unit == "percent" else ("score", 1)
        found = {kind: headline["value"], f"{kind}_stderr": headline["stderr"]}
        metrics |= {f"{name}_{what}": value / unit for what, value in found.items() if value is not None}
        if results["gold_nats"] is not None:
            metrics[f"{name}_gold_nats"] = results["gold_nats"]
        if shortened := sum(record["dropped_shots"] > 0 or record["cut"] > 0 for record in records):
            metrics[f"{name}_shortened"] = shortened / len(records)
    return metrics


def describe(questions: Sequence[Questions], metrics: dict[str, float]) -> str:
    """The figures as a log line."""
    parts = []
    for name in (one.task.name for one in questions):
        if (share := metrics.get(f"{name}_accuracy")) is not None:
            parts.append(f"{name} {share:.1%} ± {metrics.get(f'{name}_accuracy_stderr', 0):.1%}")
        elif (score := metrics.get(f"{name}_score")) is not None:
            parts.append(f"{name} {score:.2f}")
    return ", ".join(parts)
