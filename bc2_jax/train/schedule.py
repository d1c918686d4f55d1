"""Which steps of a run are evaluated, saved and kept for good, and how many tokens they have trained on."""

from __future__ import annotations

from typing import NamedTuple

from bc2_jax.config import RunConfig
from bc2_jax.metadata import is_permanent


class Schedule(NamedTuple):
    """The schedule of a run since its last resume; before it, batches may have had other sizes."""

    config: RunConfig
    has_evaluation: bool
    """Whether the job evaluates anything."""
    resumed_at: int
    """Step of the last resume or rewind."""
    tokens_before: int
    """Tokens trained on up to that step."""

    def tokens(self, step: int) -> int:
        """Tokens trained on up to a step."""
        return self.tokens_before + (step - self.resumed_at) * self.config.tokens_per_step

    def is_permanent(self, step: int) -> bool:
        return is_permanent(self.config.checkpoint, step, self.tokens(step), self.config.tokens_per_step)

    def is_evaluated(self, step: int) -> bool:
        is_regular = step % self.config.eval_every == 0 or self.is_permanent(step)
        return self.has_evaluation and (is_regular or step == self.config.num_steps)

    def is_saved(self, step: int, pinned: int | None) -> bool:
        """Whether a step is saved; that of `pinned` always is."""
        is_regular = step % self.config.checkpoint.save_every == 0 or self.is_permanent(step)
        return is_regular or step in (self.config.num_steps, pinned)
