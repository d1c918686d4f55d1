"""Metrics of a job's held-out batches."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bc2_jax.agreement import any_text
from bc2_jax.data.batch import Batch
from bc2_jax.model.baichuan import Params
from bc2_jax.train.job import Job, Parts, Progress


def evaluate(
    job: Job, eval_step: Callable[[Params, Params, Batch], Parts], params: Params, most: int,
    progress: Progress,
) -> dict[str, float] | None:  # fmt: skip
    """The objective's metrics of the first `most` validation batches, 0 for all, summed in double precision.

    `progress` is called after each batch; None, as soon as it returns False. Raises ValueError, on every process, if
    one of them cannot read a batch.
    """
    count = min(most or len(job.validation), len(job.validation))
    parts: list[Parts] = []
    for i in range(count):
        parts.append(eval_step(params, job.frozen, read_together(job.validation.__getitem__, i)))
        jax.block_until_ready(parts[max(i - 1, 0)])  # not the newest: the devices have work meanwhile
        if not progress(f"validation batch {i + 1} of {count}"):
            return None
    if not parts:
        return {}
    total = add_up_on_host(jax.device_get(parts))
    return {name: float(value) for name, value in job.objective.metrics(total).items()}


def read_together(read: Callable[[int], Batch], index: int) -> Batch:
    """What `read` gives at `index`. All processes call it; if one of them cannot read, all raise ValueError."""
    problem = ""
    try:
        batch = read(index)
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    if problem := any_text(problem):  # alone, the others would wait in the step for ever
        raise ValueError(problem)
    return batch


def add_up_on_host(parts: list[Parts]) -> Parts:
    """Parts of several batches -> those of all, in double precision."""
    sums = {name: sum(float(p.sums[name]) for p in parts) for name in parts[0].sums}
    maxima = {name: max(float(p.maxima[name]) for p in parts) for name in parts[0].maxima}
    return Parts(sums, maxima)  # type: ignore[arg-type]  # numbers stand in for arrays
