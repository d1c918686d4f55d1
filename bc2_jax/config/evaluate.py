"""Benchmarks during training."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import check_fields, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Benchmarks at evaluations; their results are metrics such as validation_TASK_accuracy."""

    tasks: tuple[str, ...] = ()
    """Benchmarks (docs/evaluation.md), separated by commas or blanks: ceval,mmlu. Those that run code are not
    allowed."""
    data_dir: str | None = None
    """Folder of the benchmarks' released files, required with tasks."""
    limit: int = 200
    """Items of each benchmark, evenly from its subjects; 0: all."""
    shots: int | None = None
    """Solved examples before each question; None: as many as the benchmark has."""
    every: int = 0
    """Steps between benchmarks, a multiple of eval_every; 0: at every evaluation. They always run at permanent
    checkpoints and at the last step."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluate.", not_negative=("limit", "every"))
        require(
            not self.tasks or self.data_dir is not None, "evaluate.data_dir", self.data_dir,
            "evaluate.tasks need the folder of the benchmarks' files",
        )  # fmt: skip
        ok = self.shots is None or self.shots >= 0
        require(ok, "evaluate.shots", self.shots, "it must be at least 0, or None")

    @property
    def names(self) -> list[str]:
        """The single names in `tasks`."""
        return [name.strip() for text in self.tasks for name in text.split(",") if name.strip()]

    def check_every(self, eval_every: int) -> None:
        """Raises ValueError unless `every` is a multiple of `eval_every`."""
        legal = f"it must be a multiple of eval_every = {eval_every}"
        require(self.every % eval_every == 0, "evaluate.every", self.every, legal)
