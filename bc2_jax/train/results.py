"""What a pre-training run prints at its start and makes at its end: tables, export, samples, pictures, hints."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from bc2_jax.config import RunConfig, TrainConfig
from bc2_jax.convert.conversion import Options, to_hf
from bc2_jax.data.baselines import bigram_cross_entropy, unigram_cross_entropy, unigram_entropy
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.loader import describe_mixture
from bc2_jax.data.packing import read_rows
from bc2_jax.infer.text import generate_text
from bc2_jax.model.baichuan import Baichuan2, Params, split_model
from bc2_jax.terminal import add_column, command, make_table
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.checks import EXPORT_NAME
from bc2_jax.train.job import Say
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture, plot_metric


def print_tables(console: Console, config: TrainConfig, mesh: Mesh) -> None:
    """Tables of the model, the batch and the mesh."""
    model, data = config.model, config.data
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "layers x hidden x ffn": f"{model.num_hidden_layers} x {model.hidden_size} x {model.intermediate_size}",
        "heads x head size": f"{model.num_attention_heads} x {model.head_dim}",
        "positions": model.position_embedding,
        "vocabulary": f"{model.vocab_size:,}",
        "compute": f"{config.compute.dtype}, {config.compute.attention} attention, remat {config.compute.remat}",
        "batch": f"{data.global_batch_size} x {data.sequence_length} tokens"
        + (f" in {data.accumulation_steps} parts" if data.accumulation_steps > 1 else ""),
    }
    _print_table(console, f"Model {config.name}", rows)
    device = mesh.devices.flat[0]
    rows = {axis: str(size) for axis, size in mesh.shape.items()}
    rows["devices"] = f"{mesh.devices.size} x {device.device_kind}, {jax.process_count()} process(es)"
    _print_table(console, "Mesh", rows)


def print_mixture(console: Console, config: TrainConfig, step: int = 0, row: int = 0) -> None:
    """A table of the share of tokens of each folder of rows, and its epochs until the end of the run.

    The run is at `row` after `step`.
    """
    data = config.data
    table = make_table("rows of", "rows", "share", title="Data", numbers_from=1)
    for first in data.stage_rows:
        at = f"step {step + -(-(first - row) // data.global_batch_size):,}, " if first >= row else ""
        add_column(table, f"from {at}{first * data.sequence_length:,} tokens", is_number=True)
    add_column(table, "epochs", is_number=True)
    for part in describe_mixture(data, row + (config.num_steps - step) * data.global_batch_size):
        shares = (f"{share:.2%}" for share in part.shares)
        answers = {"text": "", "chat": " (conversations: the answers)", "pairs": " (pairs of answers)"}[part.kind]
        table.add_row(f"{part.path}{answers}", f"{part.rows:,}", *shares, f"{part.epochs:.2f}")
    console.print(table)


def _print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    table = make_table("", "", title=title)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def make_baselines(config: TrainConfig, console: Console) -> dict[str, float]:
    """Validation cross entropy, nats per token, of n-gram models counted on the training rows."""
    train, validation = (
        np.concatenate(
            [read_rows(part.path, split) for source in config.data.sources for part in list_parts(source.path)]
        )
        for split in ("train", "validation")
    )
    vocab_size = config.model.vocab_size
    entropy = unigram_entropy(validation, vocab_size)
    baselines = {
        "unigram model": unigram_cross_entropy(train, validation, vocab_size),
        "bigram model": bigram_cross_entropy(train, validation, vocab_size),
    }
    parts = [f"unigram entropy {entropy:.4f}"]
    parts += [f"cross entropy of a {name} {value:.4f}" for name, value in baselines.items()]
    parts.append(f"of a uniform model {np.log(vocab_size):.4f}")
    console.print(f"Held-out text, nats a token: {', '.join(parts)}.", soft_wrap=True)
    return baselines


class Ending(NamedTuple):
    """What the end of a run makes besides samples."""

    export: Callable[[], Path | None]
    """Exports for other programs; returns the path or None. Every process calls it."""
    draw: Callable[[], None]
    """Draws the pictures."""
    print_hints: Callable[[Path | None], None]
    """Prints the run's files and the next commands, given the result of `export`."""


def show_results(
    config: TrainConfig, ending: Ending, model: Callable[[], Baichuan2], tokenizer: Tokenizer, start: Start
) -> None:
    """`end_run` with samples from the trained model, which `model` makes."""
    prompts = config.sample.prompts
    end_run(ending, start, (lambda: show_samples(model(), config, tokenizer, start.say)) if prompts else None)


def end_run(ending: Ending, start: Start, write_samples: Callable[[], None] | None = None) -> None:
    """Exports, writes samples, draws and prints hints. Raises an error of the export once all else is done."""
    exported, failed = None, None
    try:
        exported = ending.export()
    except (ValueError, OSError) as error:
        failed = error
    if write_samples is not None:
        with start.expendable.attempt("samples"):
            write_samples()
    if jax.process_index() == 0:
        with start.expendable.attempt("pictures"):
            ending.draw()
        ending.print_hints(exported)
    if failed is not None:
        raise failed


def finish_run(
    config: TrainConfig, checkpoint: Path, params: Params, baselines: dict[str, float], tokenizer: Tokenizer,
    start: Start,
) -> None:  # fmt: skip
    """The end of a run that trains all parameters, `params`; `checkpoint` is its last one."""
    ending = Ending(
        export=lambda: export_hf(config, checkpoint),
        draw=lambda: show_curve(checkpoint.parent.parent, baselines, start.say),
        print_hints=lambda exported: print_hints(config, checkpoint, exported, start),
    )
    graphdef = split_model(config.model, config.compute)[0]
    show_results(config, ending, lambda: nnx.merge(graphdef, params), tokenizer, start)


def export_hf(config: RunConfig, checkpoint: Path) -> Path | None:
    """WORKDIR/hf if the config asks for it, written by process 0 from the checkpoint, as no process has all arrays."""
    exported = checkpoint.parent.parent / EXPORT_NAME
    if not config.export_hf or jax.process_index() != 0:
        return None
    # May be replaced: an earlier end of this run wrote it.
    to_hf(checkpoint, exported, Options(overwrite=True, allow_unused_rows=True), dtype="float32")
    return exported


def show_curve(workdir: Path, baselines: dict[str, float], say: Say) -> None:
    """Draws WORKDIR/loss.png and prints the first and last loss on held-out text."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    plot_loss_curve(metrics, baselines, workdir / "loss.png")
    validation = [m["validation_cross_entropy"] for m in metrics if m.get("validation_cross_entropy") is not None]
    if validation:
        against = "".join(f", {name} {value:.4f}" for name, value in baselines.items())
        say(f"Validation cross entropy {validation[0]:.4f} at first, {validation[-1]:.4f} now{against}.")


def print_hints(config: TrainConfig, checkpoint: Path, exported: Path | None, start: Start) -> None:
    """The run's files and the next commands."""
    workdir, say = checkpoint.parent.parent, start.say
    print_places(checkpoint, exported, start)
    print_how_to_go_on(workdir, f"--num-steps {config.num_steps + config.checkpoint.save_every}", start)
    target = workdir / ("hf-bfloat16" if config.export_hf else "hf")
    say(f"to convert   {command('tools/convert.py', 'to-hf', checkpoint, target)}")
    say(f"to generate  {command('tools/generate.py', workdir)} --prompt ...")


def print_places(checkpoint: Path, exported: Path | None, start: Start) -> None:
    """The paths of a run's files."""
    workdir, say = checkpoint.parent.parent, start.say
    say(f"checkpoint   {checkpoint}")
    if exported is not None:
        say(f"PyTorch      {exported}")
    say(f"metrics      {workdir / 'metrics.jsonl'}, tensorboard --logdir {shlex.quote(str(workdir / 'tensorboard'))}")
    say(f"loss curve   {workdir / 'loss.png'}")


def print_how_to_go_on(workdir: Path, longer: str, start: Start) -> None:
    """The command that resumes the run and extends it with the arguments `longer`."""
    again = f"{start.command} --workdir {shlex.quote(str(workdir))}"
    start.say(f"to resume    {again} --resume auto {longer}")


def show_samples(model, config: TrainConfig, tokenizer: Tokenizer, say: Say) -> None:
    """Prints each sample prompt with the model's continuation."""
    sample = config.sample
    texts = generate_text(
        model, tokenizer, sample.prompts, max_new_tokens=sample.max_new_tokens, temperature=sample.temperature,
        top_k=sample.top_k, top_p=sample.top_p, repetition_penalty=sample.repetition_penalty, seed=config.seed,
    )  # fmt: skip
    for prompt, text in zip(sample.prompts, texts, strict=True):
        say(f"--- {prompt!r} continues:\n{text}")
    say("---")


def plot_loss_curve(metrics: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    """Training and validation cross entropy by step, with the baselines as lines."""
    with picture(path, figsize=(8, 4.5)) as axes:
        for name, label in (("cross_entropy", "training"), ("validation_cross_entropy", "validation")):
            plot_metric(axes, metrics, name, label, dots_below=50, markersize=4)
        for label, value in baselines.items():
            axes.axhline(value, label=label, linestyle="--", color="gray" if "uni" in label else "black", linewidth=1)
        axes.set(xlabel="step", ylabel="cross entropy (nats a token)")
        add_grid_and_legend(axes)
