"""What a run does with the trained parameters at its end: proof, export, samples, pictures, hints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from bc2_jax.config import TrainConfig
from bc2_jax.convert.conversion import Options, to_hf
from bc2_jax.data import ngram
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.packing import read_rows
from bc2_jax.infer.generate import generate
from bc2_jax.model.baichuan import Params, split_model
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.metrics import plot_loss_curve, read_metrics

Say = Callable[[str], None]


def make_baselines(config: TrainConfig, console: Console) -> dict[str, float]:
    """Validation cross entropy, nats a token, of n-gram models counted on the training rows."""
    train, validation = (
        np.concatenate(
            [read_rows(part.path, split) for source in config.data.sources for part in list_parts(source.path)]
        )
        for split in ("train", "validation")
    )
    vocab_size = config.model.vocab_size
    entropy = ngram.unigram_entropy(validation, vocab_size)
    baselines = {
        "unigram model": ngram.unigram_cross_entropy(train, validation, vocab_size),
        "bigram model": ngram.bigram_cross_entropy(train, validation, vocab_size),
    }
    parts = [f"unigram entropy {entropy:.4f}"]
    parts += [f"cross entropy of a {name} {value:.4f}" for name, value in baselines.items()]
    parts.append(f"of a model that knows nothing {np.log(vocab_size):.4f}")
    console.print(f"Held-out text, nats a token: {', '.join(parts)}.", soft_wrap=True)
    return baselines


def check_resumed(step: int, resumed: str, uninterrupted: str, say: Say) -> None:
    """Raises ArithmeticError unless the run repeated from a checkpoint ended in the same parameters, bit for bit."""
    if resumed != uninterrupted:
        raise ArithmeticError(
            f"Resumed at step {step}, the run ended in {resumed}, not in {uninterrupted}: it is not exact."
        )
    say(f"Resumed at step {step} and repeated: the parameters are the same bit for bit.")


def show_results(
    config: TrainConfig, checkpoint: Path, params: Params, baselines: dict[str, float], tokenizer: Tokenizer, say: Say,
    command: str,
) -> None:  # fmt: skip
    """Exports, writes samples, draws the loss curve and prints where everything is and what to type next."""
    workdir = checkpoint.parent.parent
    exported = workdir / "hf"
    if config.export_hf and jax.process_index() == 0:
        # Ours to replace: an earlier end of this same run wrote it.
        # From the files: no process has all parameters.
        to_hf(checkpoint, exported, Options(overwrite=True, allow_unused_rows=True), dtype="float32")
    if config.sample.prompts:
        model = nnx.merge(split_model(config.model, config.compute)[0], params)
        show_samples(model, config, tokenizer, say)
    if jax.process_index() != 0:
        return
    metrics = read_metrics(workdir / "metrics.jsonl")
    curve = workdir / "loss.png"
    plot_loss_curve(metrics, baselines, curve)
    validation = [m["validation_cross_entropy"] for m in metrics if m.get("validation_cross_entropy") is not None]
    if validation:
        against = "".join(f", {name} {value:.4f}" for name, value in baselines.items())
        say(f"Validation cross entropy {validation[0]:.4f} at first, {validation[-1]:.4f} now{against}.")
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    say(f"checkpoint   {checkpoint}")
    if config.export_hf:
        say(f"PyTorch      {exported}")
    say(f"metrics      {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir / 'tensorboard'}")
    say(f"loss curve   {curve}")
    longer = config.num_steps + config.checkpoint.save_every
    say(f"to go on     {python} {command} --workdir {workdir} --resume auto --num-steps {longer}")
    target = workdir / ("hf-bfloat16" if config.export_hf else "hf")
    say(f"to convert   {python} tools/convert.py to-hf {checkpoint} {target}")
    say(f"to generate  {python} tools/generate.py {workdir} --prompt ...")


def show_samples(model, config: TrainConfig, tokenizer: Tokenizer, say: Say) -> None:
    """Prints each prompt of the config with the model's continuation."""
    sample = config.sample
    continuations = generate(
        model, tokenizer.encode_batch(list(sample.prompts)), max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature, top_k=sample.top_k, top_p=sample.top_p,
        repetition_penalty=sample.repetition_penalty, seed=config.seed,
    )  # fmt: skip
    for prompt, continuation in zip(sample.prompts, continuations, strict=True):
        say(f"--- {prompt!r} goes on:\n{tokenizer.decode(continuation)}")
    say("---")
