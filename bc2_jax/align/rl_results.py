"""Output of reinforcement learning: plan at the start; export, pictures, hints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.experience import FOLDER
from bc2_jax.align.prompts import PromptSet
from bc2_jax.align.questions import compare
from bc2_jax.align.reward_functions import RewardFunction
from bc2_jax.align.sft_results import check_adapter_export, export_policy, print_rows, print_uses
from bc2_jax.config import ModelConfig, RLConfig
from bc2_jax.convert.checkpoints import ACTOR
from bc2_jax.model.baichuan import Params
from bc2_jax.train.checks import check_export
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric
from bc2_jax.train.results import Ending, print_how_to_go_on

PICTURE = "rl.png"
"""In the workdir."""


def check_exports(config: RLConfig, workdir: Path) -> None:
    """Raises FileExistsError if an export at the end can't replace what is there."""
    check_export(config, workdir)
    if config.lora.rank:
        check_adapter_export(workdir)


def print_plan(
    config: RLConfig, critic: ModelConfig, prompts: PromptSet, functions: Sequence[RewardFunction], num_questions: int,
    start: Start,
) -> None:  # fmt: skip
    """Prints the settings of the run."""
    rl, lora = config.ppo, config.lora
    rewards = [f"{rl.reward_model_weight:g} x reward model {rl.reward_model}"] if rl.reward_model else []
    rewards += [f"function {function.name}" for function in functions]
    rewards += [f"-{rl.cut_penalty:g} for an answer that is cut"] if rl.cut_penalty else []
    kl = f"{rl.kl_start:g}, {rl.kl_schedule}" + {
        "constant": "", "adaptive": f" to {rl.kl_target:g} nats an answer",
    }.get(rl.kl_schedule, f" to {rl.kl_end:g} at iteration {rl.kl_steps}")  # fmt: skip
    rows = {
        "algorithm": f"PPO, {rl.kl_estimator} in the rewards" if rl.has_critic else f"GRPO, {rl.reduction}, k3 in loss",
        "actor, reference": f"{config.init_from}, {config.model.num_parameters():,} parameters",
        "trained": f"adapters of rank {lora.rank}, the models in {config.compute.dtype}" if lora.rank else "all",
        "prompts": prompts.describe(),
        "rewards": "; ".join(rewards),
        "iteration": f"{rl.prompts_per_step} prompts x {rl.answers_per_prompt} answers of up to {rl.max_new_tokens} "
        f"tokens, {rl.rollout_rows} at a time; {rl.updates} updates of {rl.answers // rl.minibatches} answers",
        "KL coefficient": kl,
        "clip": f"{rl.clip:g}" + (f", of values {rl.value_clip}" if rl.has_critic else ""),
        "learning rate": f"{config.optimizer.peak_learning_rate:g}, clip norm {config.optimizer.clip_norm:g}",
        "questions": f"{num_questions} at each evaluation" if num_questions else "none",
    }  # fmt: skip
    if rl.has_critic:
        where = rl.reward_model or f"{config.init_from}, with values of 0"
        rows["critic"] = (
            f"from {where}, {critic.num_parameters():,} parameters, learning rate "
            f"{config.critic_optimizer.peak_learning_rate:g}; alone in the first {rl.critic_warmup_steps} iterations"
        )
    print_rows(f"Reinforcement learning {config.name}", rows, start)


def make_ending(config: RLConfig, checkpoint: Path, params: Params, start: Start) -> Ending:
    """The end of a run: exports the actor, draws, prints hints."""
    workdir, say = checkpoint.parent.parent, start.say

    def draw() -> None:
        show_course(workdir, start)
        evaluated = [m["step"] for m in read_metrics(workdir / "metrics.jsonl") if "validation_answers_right" in m]
        if evaluated:
            compare(workdir, evaluated[0], evaluated[-1], config.questions, start)

    def print_hints(exported: Path | None) -> None:
        say(f"checkpoint   {checkpoint}, actor and critic")
        say(f"metrics      {workdir / 'metrics.jsonl'}, {workdir / PICTURE}")
        say(f"answers      {workdir / FOLDER}")
        print_how_to_go_on(workdir, f"--num-steps {config.num_steps + config.checkpoint.save_every}", start)
        print_uses(config, checkpoint, exported, start)

    return Ending(
        export=lambda: export_policy(config, checkpoint, params[ACTOR], start), draw=draw, print_hints=print_hints
    )


def show_course(workdir: Path, start: Start) -> None:
    """Draws WORKDIR/rl.png and prints how reward, KL and lengths changed."""
    metrics = [m for m in read_metrics(workdir / "metrics.jsonl") if "step_seconds" in m]
    if not metrics:
        return
    plot_course(metrics, workdir / PICTURE)
    few = max(len(metrics) // 4, 1)

    def change(name: str) -> str:
        first, last = (sum(m[name] for m in part) / len(part) for part in (metrics[:few], metrics[-few:]))
        return f"{first:.3f} -> {last:.3f}"

    start.say(
        f"Means of the first and the last {few} iterations: reward {change('reward')}, KL to the reference "
        f"{change('kl')} nats a token, answers {change('answer_tokens')} tokens, cut {change('share_cut')}, entropy "
        f"{change('entropy')} nats a token."
    )
    correlation = metrics[-1]["length_reward_correlation"]
    if abs(correlation) > 0.5:
        start.say(
            f"Length and reward correlate ({correlation:.2f}): check in {workdir / FOLDER} whether the answers are "
            f"better or only {'longer' if correlation > 0 else 'shorter'}."
        )


# Panels of the picture: (title, [(metric, label), ...]).
_PANELS = (
    ("reward", None),
    ("KL to the reference (nats a token)", (("kl", "k1"), ("kl_k3", "k3"))),
    ("KL coefficient", (("kl_coefficient", ""),)),
    ("answers (tokens)", (("answer_tokens", "mean"), ("answer_tokens_longest", "longest"))),
    ("shares", (("share_cut", "cut off"), ("clip_fraction", "clipped"), ("groups_equal", "groups of equal scores"))),
    ("entropy, sampled estimate (nats a token)", (("entropy", ""),)),
    ("critic", (("explained_variance", "explained variance"),)),
    ("length against reward", (("length_reward_correlation", "correlation"),)),
    ("seconds", (("rollout_seconds", "rollout"), ("scoring_seconds", "scoring"), ("update_seconds", "update"))),
)


def plot_course(metrics: list[dict[str, Any]], path: Path) -> None:
    """Plots the health metrics of a run by iteration."""
    parts = sorted({name for m in metrics for name in m if name.startswith("reward_") and name != "reward_deviation"})
    rewards = [("reward", "all")] + [(name, name.removeprefix("reward_")) for name in parts]
    with picture(path, 3, 3, sharex=True, figsize=(15, 9)) as grid:
        for axes, (title, names) in zip(grid.flat, _PANELS, strict=True):
            for name, label in rewards if names is None else names:
                plot_metric(axes, metrics, name, label or None, dots_below=30, markersize=3)
            axes.set_title(title, fontsize=10)
            add_grid_and_legend(axes, fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel("iteration")
