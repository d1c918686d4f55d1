"""What a run of a reward model prints at its start and makes at its end: plan, statistics, picture, hints."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax

from bc2_jax.align.sft_results import longer, print_tuning
from bc2_jax.config import RewardConfig
from bc2_jax.convert.conversion import Options
from bc2_jax.convert.pretrained import find_any_model
from bc2_jax.convert.reward import STATISTICS_NAME
from bc2_jax.convert.reward_export import export_reward_model
from bc2_jax.files import replaced
from bc2_jax.terminal import command
from bc2_jax.train.checks import EXPORT_NAME
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric
from bc2_jax.train.results import Ending, print_how_to_go_on

PICTURE_NAME = "rewards.png"


def print_plan(config: RewardConfig, most_pairs: int, start: Start) -> None:
    """How the run learns."""
    centring, score = config.reward.centring, "as the run has trained it"
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


def make_ending(config: RewardConfig, checkpoint: Path, start: Start) -> Ending:
    """The end of a run whose checkpoint is the last one; with its hints go the statistics of the held-out rewards."""
    workdir, say = checkpoint.parent.parent, start.say
    metrics = functools.cache(lambda: read_metrics(workdir / "metrics.jsonl"))

    def print_hints(exported: Path | None) -> None:
        evaluated = [m for m in metrics() if m.get("validation_reward_mean") is not None]
        if evaluated:
            write_statistics(workdir, evaluated)
            first, last = evaluated[0], evaluated[-1]
            say(
                f"Held-out pairs: accuracy {first['validation_accuracy']:.1%} at step {first['step']}, "
                f"{last['validation_accuracy']:.1%} now; rewards {last['validation_reward_mean']:.4f} on average, with "
                f"a spread of {last['validation_reward_std']:.4f} ({STATISTICS_NAME})."
            )
        say(f"checkpoint   {checkpoint}")
        say(f"metrics      {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir / 'tensorboard'}")
        say(f"picture      {workdir / PICTURE_NAME}")
        print_how_to_go_on(workdir, longer(config), start)
        say(f"to measure   {command('tools/reward_report.py', workdir, config.data.sources[0].path)}")
        if exported is not None:
            say(f"PyTorch      {exported}, LlamaForSequenceClassification")

    return Ending(
        export=lambda: export(config, checkpoint),
        draw=lambda: plot_rewards(metrics(), workdir / PICTURE_NAME),
        print_hints=print_hints,
    )


def export(config: RewardConfig, checkpoint: Path) -> Path | None:
    """WORKDIR/hf, if the config asks for it, written by the first process."""
    if not config.export_hf or jax.process_index() != 0:
        return None
    # Ours to replace: an earlier end of this same run wrote it.
    target = checkpoint.parent.parent / EXPORT_NAME
    export_reward_model(checkpoint, target, Options(overwrite=True), "float32")
    return target


def write_statistics(workdir: Path, evaluated: list[dict[str, Any]]) -> None:
    """STATISTICS_NAME from the metrics of evaluations, for those who shift rewards (`convert.reward`)."""
    record = {
        str(m["step"]): {
            "mean": m["validation_reward_mean"], "std": m["validation_reward_std"], "answers": 2 * m["validation_pairs"]
        }
        for m in evaluated
    }  # fmt: skip
    with replaced(workdir / STATISTICS_NAME) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plot_rewards(metrics: list[dict[str, Any]], path: Path) -> None:
    """A picture by step: the loss, the share of pairs whose chosen answer has the higher reward, and both rewards."""
    with picture(path, 3, sharex=True, figsize=(8, 8)) as (top, middle, bottom):
        held_out: dict[str, Any] = {"marker": "o", "markersize": 4}
        plot_metric(top, metrics, "loss", "training", linewidth=0.8)
        plot_metric(top, metrics, "validation_loss", "held out", **held_out)
        top.axhline(math.log(2), color="gray", linestyle="--", linewidth=1, label="log 2: knows nothing")
        top.set(ylabel="loss (nats a pair)")
        plot_metric(middle, metrics, "accuracy", "training", 100, linewidth=0.8)
        plot_metric(middle, metrics, "validation_accuracy", "held out", 100, **held_out)
        middle.axhline(50, color="gray", linestyle="--", linewidth=1)
        middle.set(ylabel="chosen answer wins (%)", ylim=(-3, 103))
        for answer in ("chosen", "rejected"):
            plot_metric(bottom, metrics, f"validation_{answer}_reward", f"{answer}, held out", **held_out)
        bottom.set(xlabel="step", ylabel="mean reward")
        for axes in (top, middle, bottom):
            add_grid_and_legend(axes)
