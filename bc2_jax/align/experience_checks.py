"""Checks that stop reinforcement learning if it is broken or has nothing left to learn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from bc2_jax.config import RLConfig

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}
"""By compute dtype: largest mean difference, nats a token, of log-probabilities that differ only by rounding."""
SAMPLER_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""The same between decoding and the training forward pass, which are different programs."""


@dataclasses.dataclass(frozen=True)
class Checks:
    """Checks each iteration before its updates."""

    config: RLConfig
    say: Callable[[str], None] = dataclasses.field(compare=False)
    without_eos: int = 0
    """Iterations in a row in which no answer ended."""
    without_contrast: int = 0
    """Iterations in a row in which all compared scores were equal."""

    def state(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"without_eos": self.without_eos, "without_contrast": self.without_contrast}

    def with_state(self, state: dict[str, Any]) -> Checks:
        return dataclasses.replace(self, **state)

    def updated(self, step: int, metrics: dict[str, float]) -> Checks:
        """The counts after an iteration with these metrics. Raises ArithmeticError to stop the run."""
        dtype = self.config.compute.dtype
        if not -1e-9 <= metrics["kl_k3"] < math.inf:  # false for NaN too
            raise ArithmeticError(
                f"step {step}: the KL to the reference (k3) is {metrics['kl_k3']}: it must be finite and not negative, "
                "so log-probabilities of actor or reference are wrong; nothing was learned from this iteration."
            )
        distance = metrics["reference_distance"]
        if step == 1 and distance > TOLERANCES[dtype]:
            raise ArithmeticError(
                f"step {step}: before the first update the actor must equal the reference, as both are init_from = "
                f"{self.config.init_from!r}, but their log-probabilities differ by {distance:.2g} nats a token (with "
                f"compute.dtype {dtype} at most {TOLERANCES[dtype]:g}); nothing was learned from this iteration."
            )
        distance = metrics["sampler_distance"]
        if distance > SAMPLER_TOLERANCES[dtype]:
            self.say(
                f"step {step}  WARNING: the log-probabilities of decoding and of the training forward pass differ by "
                f"{distance:.2g} nats a token (with compute.dtype {dtype} at most {SAMPLER_TOLERANCES[dtype]:g})"
            )
        without_eos = self.without_eos + 1 if metrics["share_cut"] == 1 else 0
        without_contrast = self.without_contrast + 1 if metrics["groups_equal"] == 1 else 0
        most = self.config.ppo.max_new_tokens
        self._count(step, without_eos, f"no answer ended: no eos was sampled within {most} tokens", (
            "the chat model does not end its answers, or ppo.max_new_tokens is too small"))  # fmt: skip
        self._count(step, without_contrast, "all scores that are compared are equal", (
            "nothing is left to learn: the prompts are too easy or too hard, or the reward does not distinguish answers"
        ))  # fmt: skip
        return dataclasses.replace(self, without_eos=without_eos, without_contrast=without_contrast)

    def _count(self, step: int, count: int, what: str, why: str) -> None:
        if not count:
            return
        patience = self.config.ppo.patience
        if patience and count >= patience:
            raise ArithmeticError(
                f"step {step}: {what}, {count} iterations in a row (ppo.patience = {patience}): {why}."
            )
        self.say(f"step {step}  WARNING: {what}" + (f", {count} iterations in a row" if count > 1 else ""))


def check_ratio(config: RLConfig, step: int, metrics: dict[str, float]) -> None:
    """Raises ArithmeticError if the ratio of new and old probability is not 1 in the first update of an iteration."""
    distance, dtype = metrics["first_log_ratio"], config.compute.dtype
    if distance > TOLERANCES[dtype]:
        raise ArithmeticError(
            f"step {step}: in its first update the ratio of new and old probability is not 1: the log-probabilities "
            f"differ by {distance:.2g} nats a token from those computed after the rollout (with "
            f"compute.dtype {dtype} at most {TOLERANCES[dtype]:g}); the step is not saved."
        )
