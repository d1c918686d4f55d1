"""Benchmarks that a run asks its model while it is trained."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import require, require_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Benchmarks at some of the evaluations; their figures are metrics validation_TASK_accuracy and the like."""

    tasks: tuple[str, ...] = ()
    """Names of benchmarks (docs/evaluation.md), such as ceval,mmlu, with commas or blanks between them. Those that run
    code are not possible here."""
    data_dir: str | None = None
    """Folder of the benchmarks' released files."""
    limit: int = 200
    """Items of each benchmark, taken evenly from its subjects; 0 for all."""
    shots: int | None = None
    """Solved examples before each question, if fewer than the benchmark has."""
    every: int = 0
    """Steps between them, a multiple of eval_every; 0 asks at every evaluation. At permanent checkpoints and at the
    last step they are asked in any case."""

    def __post_init__(self) -> None:
        require_types(self, "evaluate.")
        require(
            not self.tasks or self.data_dir is not None, "evaluate.data_dir", self.data_dir,
            "evaluate.tasks need the folder of the benchmarks' files",
        )  # fmt: skip
        for field in ("limit", "every"):
            require(getattr(self, field) >= 0, f"evaluate.{field}", getattr(self, field), "it must be at least 0")
        require(
            self.shots is None or self.shots >= 0, "evaluate.shots", self.shots, "it must be at least 0, or None"
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Those of `tasks`, one by one."""
        return [name.strip() for text in self.tasks for name in text.split(",") if name.strip()]

    def check_every(self, eval_every: int) -> None:
        """Raises ValueError unless benchmarks are asked at evaluations, which are every `eval_every` steps."""
        legal = f"it must be a multiple of eval_every = {eval_every}"
        require(self.every % eval_every == 0, "evaluate.every", self.every, legal)
