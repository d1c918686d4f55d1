"""Output of preference tuning and of reward models: plan at the start; pictures, statistics and hints at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax

from bc2_jax.align.sft_results import longer, print_tuning
from bc2_jax.config import DPOConfig, RewardConfig
from bc2_jax.convert.conversion import Options
from bc2_jax.convert.pretrained import find_any_model
from bc2_jax.convert.reward import STATISTICS_NAME
from bc2_jax.convert.reward_export import export_reward_model
from bc2_jax.files import replaced
from bc2_jax.terminal import command
from bc2_jax.train.checks import EXPORT_NAME
from bc2_jax.train.job import Say
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric
from bc2_jax.train.results import Ending, print_how_to_go_on

REWARDS_PICTURE = "rewards.png"
_LOSSES = {
    "sigmoid": "sigmoid (DPO)", "cdpo": "cdpo (conservative DPO)", "robust": "robust (DPO)", "hinge": "hinge (SLiC)",
    "ipo": "ipo, of sums over tokens", "ipo_mean": "ipo_mean, of means over tokens",
    "sigmoid_norm": "sigmoid_norm, of means over tokens",
}  # fmt: skip


def print_dpo_plan(config: DPOConfig, most_pairs: int, num_questions: int, start: Start) -> None:
    """Prints the settings of preference tuning."""
    options = config.dpo
    rows = {
        "reference": "the model it starts from",
        "loss": _LOSSES[options.loss],
        "beta": f"{options.beta:g}",
        "label smoothing": f"{options.label_smoothing:g}" if options.label_smoothing else "no",
        "cross entropy of chosen": f"weight {options.sft_weight:g}" if options.sft_weight else "no",
        "max-z loss": "no",
        "pairs": f"at most {most_pairs} in a row; every pair has the same weight",
        "questions": f"{num_questions} at each evaluation" if num_questions else "none",
    }
    print_tuning("Preference tuning", config, rows, start)


def print_reward_plan(config: RewardConfig, most_pairs: int, start: Start) -> None:
    """Prints the settings of the training of a reward model."""
    centring, score = config.reward.centring, "resumed"
    if start.metadata is None:
        is_reward_model = find_any_model(str(config.init_from)).is_reward_model
        score = "that of the reward model" if is_reward_model else "new; the head of the language model is left out"
    rows = {
        "score": score,
        "margins": "those of the data, where a pair has one" if config.reward.use_margins else "not used",
        "centring": f"{centring:g}" if centring else "no",
        "pairs": f"at most {most_pairs} in a row; every pair has the same weight",
    }
    print_tuning("Reward model", config, rows, start)


def show_pairs(workdir: Path, say: Say) -> None:
    """Draws WORKDIR/loss.png of preference tuning and prints the results on held-out pairs."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    plot_pairs(metrics, workdir / "loss.png", is_reward_model=False)
    evaluated = [m for m in metrics if m.get("validation_chosen_reward") is not None]
    if not evaluated:
        return
    first, last = evaluated[0], evaluated[-1]
    fall = ""
    if last["validation_chosen_reward"] < 0:
        fall = " The chosen answers became less likely: the loss only widens the margin."
    say(
        f"Held-out pairs: loss {first['validation_loss']:.4f} at step {first['step']}, {last['validation_loss']:.4f} "
        f"now; accuracy {last['validation_accuracy']:.1%}; reward {last['validation_chosen_reward']:.3f} of chosen and "
        f"{last['validation_rejected_reward']:.3f} of rejected answers.{fall}"
    )


def plot_pairs(metrics: list[dict[str, Any]], path: Path, is_reward_model: bool) -> None:
    """Plots by step: loss, accuracy, rewards of both answers and, of a policy, their log-probabilities."""
    trained: dict[str, Any] = {"linewidth": 0.8}
    held_out: dict[str, Any] = {"marker": "o", "markersize": 4}
    rows, columns, size = (3, 1, (8, 8)) if is_reward_model else (2, 2, (11, 7))
    with picture(path, rows, columns, sharex=True, figsize=size) as grid:
        loss, accuracy, rewards, *others = grid.flat
        plot_metric(loss, metrics, "loss", "training", **trained)
        plot_metric(loss, metrics, "validation_loss", "held out", **held_out)
        loss.set(ylabel="loss of a pair (nats)")
        plot_metric(accuracy, metrics, "accuracy", "training", 100, **trained)
        plot_metric(accuracy, metrics, "validation_accuracy", "held out", 100, **held_out)
        accuracy.axhline(50, color="gray", linestyle="--", linewidth=1)
        accuracy.set(ylabel="chosen answer has the higher reward (%)", ylim=(-3, 103))
        for answer, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            name, label = f"validation_{answer}", f"{answer}, held out"
            plot_metric(rewards, metrics, f"{name}_reward", label, color=color, **held_out)
            if not is_reward_model:
                thin: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.5}
                plot_metric(rewards, metrics, f"{answer}_reward", f"{answer}, training", color=color, **thin)
            for log_probs in others:
                plot_metric(log_probs, metrics, f"{name}_log_prob", label, color=color, **held_out)
                log_probs.set(xlabel="step", ylabel="log-probability of an answer (nats)")
        rewards.set(xlabel="step", ylabel="mean reward" if is_reward_model else "reward: beta (policy - reference)")
        if is_reward_model:
            loss.axhline(math.log(2), color="gray", linestyle="--", linewidth=1, label="log 2: a guess")
        else:
            rewards.axhline(0, color="gray", linestyle="--", linewidth=1)
        for axes in grid.flat:
            add_grid_and_legend(axes)


def make_reward_ending(config: RewardConfig, checkpoint: Path, start: Start) -> Ending:
    """The end of the training of a reward model: export, picture, statistics of the held-out rewards, hints."""
    workdir, say = checkpoint.parent.parent, start.say

    def print_hints(exported: Path | None) -> None:
        metrics = read_metrics(workdir / "metrics.jsonl")
        evaluated = [m for m in metrics if m.get("validation_reward_mean") is not None]
        if evaluated:
            write_statistics(workdir, evaluated)
            first, last = evaluated[0], evaluated[-1]
            say(
                f"Held-out pairs: accuracy {first['validation_accuracy']:.1%} at step {first['step']}, "
                f"{last['validation_accuracy']:.1%} now; rewards {last['validation_reward_mean']:.4f} on average, with "
                f"a standard deviation of {last['validation_reward_std']:.4f} ({STATISTICS_NAME})."
            )
        say(f"checkpoint   {checkpoint}")
        say(f"metrics      {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir / 'tensorboard'}")
        say(f"picture      {workdir / REWARDS_PICTURE}")
        print_how_to_go_on(workdir, longer(config), start)
        say(f"to measure   {command('tools/reward_report.py', workdir, config.data.sources[0].path)}")
        if exported is not None:
            say(f"PyTorch      {exported}, LlamaForSequenceClassification")

    def draw() -> None:
        plot_pairs(read_metrics(workdir / "metrics.jsonl"), workdir / REWARDS_PICTURE, is_reward_model=True)

    return Ending(export=lambda: export(config, checkpoint), draw=draw, print_hints=print_hints)


def export(config: RewardConfig, checkpoint: Path) -> Path | None:
    """Writes WORKDIR/hf if the config asks for it, on the first process."""
    if not config.export_hf or jax.process_index() != 0:
        return None
    # May be replaced: an earlier end of this run wrote it.
    target = checkpoint.parent.parent / EXPORT_NAME
    export_reward_model(checkpoint, target, Options(overwrite=True), "float32")
    return target


def write_statistics(workdir: Path, evaluated: list[dict[str, Any]]) -> None:
    """Writes STATISTICS_NAME: mean and standard deviation of the held-out rewards, by step of the evaluation."""
    record = {
        str(m["step"]): {
            "mean": m["validation_reward_mean"], "std": m["validation_reward_std"], "answers": 2 * m["validation_pairs"]
        }
        for m in evaluated
    }  # fmt: skip
    with replaced(workdir / STATISTICS_NAME) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
