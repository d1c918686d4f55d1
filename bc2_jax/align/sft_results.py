"""Output of runs that start from a model: plan at the start; export, pictures, answers before and after, hints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.text import Text

from bc2_jax.align.questions import compare, find_questions
from bc2_jax.config import AskedConfig, FineTuneConfig, RLConfig, RunConfig, TunedConfig
from bc2_jax.convert.conversion import Options
from bc2_jax.convert.folder import check_free, foreign_in_adapter
from bc2_jax.convert.merging import merge_lora
from bc2_jax.convert.peft import save_peft
from bc2_jax.model.baichuan import Params
from bc2_jax.model.lora import Adapter
from bc2_jax.sharding import to_host
from bc2_jax.terminal import command, make_table
from bc2_jax.train.checks import EXPORT_NAME
from bc2_jax.train.job import Say
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric
from bc2_jax.train.results import Ending, export_hf, print_how_to_go_on, print_places, show_curve

ADAPTER_NAME = "adapter"
"""Folder of exported adapters, in the workdir."""


def check_adapter_export(workdir: Path) -> None:
    """Raises FileExistsError if the export at the end can't replace what is there."""
    check_free(workdir / ADAPTER_NAME, True, foreign_in_adapter)


def print_plan(config: FineTuneConfig, num_questions: int, start: Start) -> None:
    """Prints the settings of fine-tuning."""
    z_loss = config.model.z_loss_weight
    rows = {
        "weight of the loss": f"the same for each {'target' if config.loss_weighting == 'token' else 'sample'}",
        "NEFTune": f"alpha {config.neftune_alpha:g}" if config.neftune_alpha else "no",
        "max-z loss": f"{z_loss:g}: not used for fine-tuning by the authors" if z_loss else "no",
        "questions": f"{num_questions} at each evaluation" if num_questions else "none",
    }
    print_tuning("Fine-tuning", config, rows, start)


def print_tuning(title: str, config: TunedConfig, rows: Mapping[str, str], start: Start) -> None:
    """Prints the settings that all runs from a model share, and `rows` of its kind."""
    optimizer, lora = config.optimizer, config.lora
    low, high = optimizer.min_learning_rate, optimizer.peak_learning_rate
    rate = f"{high:g}, constant" if low == high else f"{high:g}, by a cosine to {low:g} at step {optimizer.decay_steps}"
    warmup = f"after {optimizer.warmup_steps} steps of warm-up" if optimizer.warmup_steps else "no warm-up"
    rows = {
        "starts from": str(config.init_from),
        "trained": "all parameters",
        "steps": f"{config.num_steps:,}" + (f" (num_epochs {config.num_epochs:g})" if config.num_epochs else ""),
        "learning rate": f"{rate}, {warmup}",
        **rows,
    }
    if lora.rank:
        rank = ", ".join(map(str, lora.ranks)) or str(lora.rank)
        kind = "".join(name for name, used in ((", rsLoRA", lora.rslora), (", DoRA", lora.dora)) if used)
        rows["trained"] = f"adapters of rank {rank}{kind}, dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
        rows["frozen"] = f"the base model, in {config.compute.dtype}"
    print_rows(title, rows, start)


def print_rows(title: str, rows: Mapping[str, str], start: Start) -> None:
    """Prints a table of names and values."""
    table = make_table("", "", title=title)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    start.console.print(table)


def make_ending(
    config: AskedConfig, checkpoint: Path, params: Params, start: Start,
    draw_curve: Callable[[Path, Say], None] | None = None, loss: str = "cross_entropy",
) -> Ending:  # fmt: skip
    """The end of a run. `draw_curve` draws WORKDIR/loss.png and prints the results (default: cross entropy); `loss` is
    the metric plotted beside answers."""
    workdir = checkpoint.parent.parent

    def draw() -> None:
        if draw_curve is None:
            show_curve(workdir, {}, start.say)
        else:
            draw_curve(workdir, start.say)
        metrics = [m for m in read_metrics(workdir / "metrics.jsonl") if m.get("validation_answers_right") is not None]
        if metrics:
            plot_answers(metrics, workdir / "answers.png", loss)
            compare(workdir, metrics[0]["step"], metrics[-1]["step"], config.questions, start)

    return Ending(
        export=lambda: export_policy(config, checkpoint, params, start),
        draw=draw,
        print_hints=lambda exported: print_hints(config, checkpoint, exported, start),
    )


def export_policy(config: AskedConfig | RLConfig, checkpoint: Path, params: Params, start: Start) -> Path | None:
    """Exports adapters, or the whole model if config.export_hf; returns the folder, None if nothing was written."""
    if config.lora.rank:
        return export_adapter(config, Adapter(config.lora, params), checkpoint.parent.parent, start)
    return export_hf(config, checkpoint)


def export_adapter(config: RunConfig, adapter: Adapter, workdir: Path, start: Start) -> Path | None:
    """Writes WORKDIR/adapter for PEFT and, with export_hf, WORKDIR/hf, the base model with the adapter merged, in its
    dtype; on the first process."""
    adapter = adapter._replace(params=jax.tree.map(to_host, adapter.params))  # sharded over processes
    if jax.process_index() != 0:
        return None
    # May be replaced: an earlier end of this run wrote them.
    exported, base = workdir / ADAPTER_NAME, str(config.init_from)
    save_peft(exported, adapter, config.model, base=base, overwrite=True)
    if config.export_hf:
        options = Options(overwrite=True, allow_unused_rows=True)
        for note in merge_lora(base, exported, workdir / EXPORT_NAME, options).notes:
            start.say(f"{EXPORT_NAME}: {note}")
    return exported


def plot_answers(metrics: list[dict[str, Any]], path: Path, loss: str = "cross_entropy") -> None:
    """Plots by step: the loss on held-out rows and the shares of questions answered right."""
    with picture(path, 2, sharex=True, figsize=(8, 6)) as (above, below):
        plot_metric(above, metrics, f"validation_{loss}", None, marker="o", markersize=4)
        above.set(ylabel="loss on held-out pairs" if loss == "loss" else "loss on held-out answers\n(nats a token)")
        for name, label in (("answers_right", "right"), ("answers_ended", "end by themselves")):
            plot_metric(below, metrics, f"validation_{name}", label, 100, marker="o", markersize=4)
        below.set(xlabel="step", ylabel="held-out questions (%)", ylim=(-3, 103))
        for axes in (above, below):
            add_grid_and_legend(axes)


def print_hints(config: AskedConfig, checkpoint: Path, exported: Path | None, start: Start) -> None:
    """Prints where the files are and what to run next."""
    workdir, say = checkpoint.parent.parent, start.say
    print_places(checkpoint, exported if not config.lora.rank else None, start)
    if find_questions(config) is not None:
        say(f"answers      {workdir / 'answers'}, {workdir / 'answers.png'}")
    print_how_to_go_on(workdir, longer(config), start)
    print_uses(config, checkpoint, exported, start)


def longer(config: TunedConfig) -> str:
    """Arguments that extend a finished run."""
    steps = f"--num-steps {config.num_steps + config.checkpoint.save_every}"
    return steps if config.num_epochs is None else f"{steps} --num-epochs {2 * config.num_epochs:g}"  # both limit


def print_uses(config: AskedConfig | RLConfig, checkpoint: Path, exported: Path | None, start: Start) -> None:
    """Prints how to chat with the trained model and how to convert it."""
    workdir, say = checkpoint.parent.parent, start.say
    if not config.lora.rank:
        say(f"to chat      {command('tools/generate.py', workdir, '--chat')}")
        target = workdir / ("hf-bfloat16" if config.export_hf else "hf")
        say(f"to convert   {command('tools/convert.py', 'to-hf', checkpoint, target)}")
        return
    if exported is not None:
        say(f"adapter      {exported}, as PEFT reads it")
    adapter, merged = workdir / ADAPTER_NAME, workdir / EXPORT_NAME
    if config.export_hf:
        say(f"PyTorch      {merged}, the base model with the adapter in its weights")
    else:
        say(f"to merge     {command('tools/convert.py', 'merge-lora', config.init_from, adapter, merged)}")
    say(f"to chat      {command('tools/generate.py', config.init_from, '--adapter', adapter, '--chat')}")
