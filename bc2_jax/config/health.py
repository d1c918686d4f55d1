"""Reactions to losses that are not finite or that jump."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import check_fields, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Skipped updates, metrics of norms, and rewinds after loss spikes."""

    max_skipped_updates: int = 0
    """Consecutive updates that may be skipped because loss or gradients are not finite; one more stops the run and
    saves its batch. 0 stops at the first."""
    norms: bool = True
    """Also log the norm of the parameters, the update's norm over it, and norms of the output embedding's rows."""
    spike_deviations: float = 0.0
    """A loss is high if it exceeds the median of the last ones by this many deviations (1.4826 times the median
    absolute deviation). `spike_steps` high losses in a row are a spike: the run rewinds to a checkpoint before it and
    skips its rows. Usually 6 to 10; 0: never."""
    spike_steps: int = 5
    """Consecutive high losses that make a spike."""
    spike_window: int = 100
    """Number of last losses of the median; before there are so many, no loss is high."""
    max_rewinds: int = 3
    """Most rewinds; at the next spike the run stops."""

    def __post_init__(self) -> None:
        not_negative = ("max_skipped_updates", "spike_deviations", "max_rewinds")
        check_fields(self, "health.", ("spike_steps", "spike_window"), not_negative)

    def check_checkpoints(self, save_every: int, keep_last: int) -> None:
        """Raises ValueError if the checkpoint before a spike may be deleted before the spike is detected."""
        if self.spike_deviations:
            require(
                self.spike_steps < save_every,
                "health.spike_steps", self.spike_steps, f"it must be less than checkpoint.save_every = {save_every}",
            )  # fmt: skip
            require(
                keep_last >= 2, "checkpoint.keep_last", keep_last, "with health.spike_deviations it must be 2 or more"
            )
