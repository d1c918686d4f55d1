"""What a run of preference tuning prints at its start and draws at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bc2_jax.align.sft_results import print_tuning
from bc2_jax.config import DPOConfig
from bc2_jax.train.job import Say
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric

NAMES = {
    "sigmoid": "sigmoid (DPO)", "cdpo": "cdpo (conservative DPO)", "robust": "robust (DPO)", "hinge": "hinge (SLiC)",
    "ipo": "ipo, of sums over tokens", "ipo_mean": "ipo_mean, of means over tokens",
    "sigmoid_norm": "sigmoid_norm, of means over tokens",
}  # fmt: skip


def print_plan(config: DPOConfig, most_pairs: int, num_questions: int, start: Start) -> None:
    """How the run learns."""
    options = config.dpo
    rows = {
        "reference": "the model it starts from",
        "loss": NAMES[options.loss],
        "beta": f"{options.beta:g}",
        "label smoothing": f"{options.label_smoothing:g}" if options.label_smoothing else "no",
        "cross entropy of chosen": f"weight {options.sft_weight:g}" if options.sft_weight else "no",
        "max-z loss": "no",
        "pairs": f"at most {most_pairs} in a row; every pair has the same weight",
        "questions": f"{num_questions} at each evaluation" if num_questions else "none",
    }
    print_tuning("Preference tuning", config, rows, start)


def draw_preferences(workdir: Path, say: Say) -> None:
    """Draws WORKDIR/loss.png and says what became of the held-out pairs."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    plot_preferences(metrics, workdir / "loss.png")
    evaluated = [m for m in metrics if m.get("validation_chosen_reward") is not None]
    if not evaluated:
        return
    first, last = evaluated[0], evaluated[-1]
    fall = ""
    if last["validation_chosen_reward"] < 0:
        fall = " The chosen answers have become less likely than they were: only the margin to the others is trained."
    say(
        f"Held-out pairs: loss {first['validation_loss']:.4f} at step {first['step']}, {last['validation_loss']:.4f} "
        f"now; accuracy {last['validation_accuracy']:.1%}; reward {last['validation_chosen_reward']:.3f} of chosen and "
        f"{last['validation_rejected_reward']:.3f} of rejected answers.{fall}"
    )


def plot_preferences(metrics: list[dict[str, Any]], path: Path) -> None:
    """A picture by step: loss, share of pairs with the higher reward for the chosen answer, rewards of both answers,
    and their log-probabilities."""
    with picture(path, 2, 2, sharex=True, figsize=(11, 7)) as axes:
        trained: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.5}
        held_out: dict[str, Any] = {"marker": "o", "markersize": 4}
        loss, accuracy, rewards, log_probs = axes.flat
        plot_metric(loss, metrics, "loss", "training", linewidth=0.8)
        plot_metric(loss, metrics, "validation_loss", "held out", **held_out)
        loss.set(ylabel="loss of a pair")
        plot_metric(accuracy, metrics, "accuracy", "training", 100, linewidth=0.8)
        plot_metric(accuracy, metrics, "validation_accuracy", "held out", 100, **held_out)
        accuracy.axhline(50, color="gray", linestyle="--", linewidth=1)
        accuracy.set(ylabel="chosen answer has the higher reward (%)", ylim=(-3, 103))
        for answer, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            in_training, measured = f"{answer}, training", f"{answer}, held out"
            plot_metric(rewards, metrics, f"{answer}_reward", in_training, color=color, **trained)
            plot_metric(rewards, metrics, f"validation_{answer}_reward", measured, color=color, **held_out)
            plot_metric(log_probs, metrics, f"validation_{answer}_log_prob", measured, color=color, **held_out)
        rewards.axhline(0, color="gray", linestyle="--", linewidth=1)
        rewards.set(xlabel="step", ylabel="reward: beta (policy - reference)")
        log_probs.set(xlabel="step", ylabel="log-probability of an answer (nats)")
        for place in axes.flat:
            add_grid_and_legend(place)
