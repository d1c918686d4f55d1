"""What a run does when its training goes wrong."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import require, require_positive, require_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Losses that are not finite, and losses that jump."""

    max_skipped_updates: int = 0
    """Updates in a row that may be skipped because their loss or gradients are not finite; one more stops the run and
    saves its batch. 0 stops at the first."""
    norms: bool = True
    """Also log the norm of the parameters, that of the update over it, and those of the output embedding's rows."""
    spike_deviations: float = 0.0
    """A loss is high if it lies above the median of the last ones by this many deviations (1.4826 times the median
    absolute deviation); `spike_steps` high ones in a row are a spike: the run goes back to a checkpoint before it and
    leaves out its rows. 0 never does; usual are 6 to 10."""
    spike_steps: int = 5
    """High losses in a row that are a spike."""
    spike_window: int = 100
    """How many of the last losses the median is of; none is judged before there are so many."""
    max_rewinds: int = 3
    """How often a run may go back; at the next spike it stops."""

    def __post_init__(self) -> None:
        require_types(self, "health.")
        require_positive(self, "health.", "spike_steps", "spike_window")
        for field in ("max_skipped_updates", "spike_deviations", "max_rewinds"):
            value = getattr(self, field)
            require(value >= 0, f"health.{field}", value, "it must be at least 0")

    def check_checkpoints(self, save_every: int, keep_last: int) -> None:
        """Raises ValueError if the checkpoint before a spike may be gone when the spike is known."""
        if self.spike_deviations:
            require(
                self.spike_steps < save_every,
                "health.spike_steps", self.spike_steps, f"it must be less than checkpoint.save_every = {save_every}",
            )  # fmt: skip
            require(
                keep_last >= 2, "checkpoint.keep_last", keep_last, "with health.spike_deviations it must be 2 or more"
            )
