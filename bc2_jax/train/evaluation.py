"""Metrics of a job's held-out batches."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bc2_jax.agreement import any_text
from bc2_jax.data.batch import Batch
from bc2_jax.model.baichuan import Params
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.job import Job, Parts, Progress, Say


def evaluate(
    job: Job, eval_step: Callable[[Params, Params, Batch], Parts], params: Params, most: int, progress: Progress
) -> dict[str, float] | None:  # fmt: skip
    """The objective's metrics on the first `most` validation batches (0: all), summed in double precision.

    `progress` is called after each batch; returns None as soon as it returns False. Raises ValueError, on every
    process, if one of them cannot read a batch.
    """
    count = min(most or len(job.validation), len(job.validation))
    parts: list[Parts] = []
    for i in range(count):
        parts.append(eval_step(params, job.frozen, read_together(job.validation.__getitem__, i)))
        jax.block_until_ready(parts[max(i - 1, 0)])  # not the newest: the devices stay busy
        if not progress(f"validation batch {i + 1} of {count}"):
            return None
    if not parts:
        return {}
    parts = jax.device_get(parts)
    sums = {name: sum(float(p.sums[name]) for p in parts) for name in parts[0].sums}
    maxima = {name: max(float(p.maxima[name]) for p in parts) for name in parts[0].maxima}
    total = Parts(sums, maxima)  # type: ignore[arg-type]  # numbers stand in for arrays
    return {name: float(value) for name, value in job.objective.metrics(total).items()}


def evaluate_and_examine(
    job: Job, eval_step: Callable[[Params, Params, Batch], Parts], step: int, params: Params, most: int,
    progress: Progress, expendable: Expendable, say: Say,
) -> dict[str, float] | None:  # fmt: skip
    """`evaluate`, then the job's further evaluation, as metrics named validation_...; None if the run is to stop
    before their end."""
    values = evaluate(job, eval_step, params, most, progress)
    if values:
        say(f"step {step}  validation {job.objective.summary(values)}")
    if values is not None and job.examine is not None:
        more: dict[str, float] | None = {}
        with expendable.attempt("further evaluations"):  # a failure keeps the metrics above
            more = job.examine(step, params, progress)
        values = None if more is None else values | more
    return None if values is None else {f"validation_{name}": value for name, value in values.items()}


def read_together(read: Callable[[int], Batch], index: int) -> Batch:
    """`read(index)`. All processes call it; if one of them cannot read, all raise ValueError."""
    problem = ""
    try:
        batch = read(index)
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    if problem := any_text(problem):  # otherwise the other processes would wait in the step forever
        raise ValueError(problem)
    return batch
