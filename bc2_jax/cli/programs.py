"""`bc2 SUBCOMMAND`: all programs behind one command; a program is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from bc2_jax.version import __version__


class Program(NamedTuple):
    module: str
    """Of bc2_jax/cli; its `main` gets the arguments and returns the exit code."""
    summary: str
    arguments: tuple[str, ...] = ()
    """Come before those of the command line."""


PROGRAMS = {
    "demo": Program("demo", "train a small model on real text; --all: the whole life of one, with a report"),
    "paper": Program("paper", "tables and figures of the Baichuan 2 report in miniature"),
    "train": Program("train", "pre-train, fine-tune or align a model by a config"),
    "curate": Program("curate", "raw text -> clean, deduplicated, weighted documents"),
    "train-quality": Program("train_quality", "good and bad documents -> a model of quality for curate"),
    "train-tokenizer": Program("train_tokenizer", "documents -> a tokenizer"),
    "tokenize": Program("tokenize_corpus", "documents -> packed rows for pre-training"),
    "prepare-chat": Program("prepare_chat", "conversations or preference pairs -> packed rows for fine-tuning"),
    "inspect-data": Program("inspect_data", "show packed rows; find copies and benchmark items in them"),
    "convert": Program("convert", "checkpoints to and from PyTorch, GGUF and PEFT; inspect and compare them"),
    "quantize": Program("quantize", "write a model in int8 or int4 and measure the difference"),
    "evaluate": Program("evaluate", "benchmarks: C-Eval, CMMLU, MMLU, GSM8K and others, or lm-eval's tasks"),
    "perplexity": Program("perplexity", "how well a model predicts texts"),
    "generate": Program("generate", "continue prompts with a model"),
    "chat": Program("generate", "talk with a chat model, here or on a server", ("--chat",)),
    "serve": Program("serve", "serve a model over HTTP with OpenAI's API and a chat page"),
    "checkpoints": Program("checkpoints", "list, verify and export the checkpoints of a run"),
    "replay": Program("replay", "repeat a recorded training step and compare it bit for bit"),
    "red-team": Program("red_team", "attack a chat model and count what it gives away and what it refuses"),
    "reward-report": Program("reward_report", "how often a reward model prefers the answer that people chose"),
    "scaling-law": Program("scaling_law", "fit a scaling law to runs and predict larger ones"),
    "estimate": Program("aot_compile", "compile a run for a TPU pod without one: memory, collectives, MFU"),
    "check-hardware": Program(
        "check_hardware", "check kernels on this machine's devices and measure what estimates assume"
    ),
    "parity": Program("check_parity", "compare a model's outputs with PyTorch's or recorded ones"),
    "tune-attention": Program("tune_attention", "choose block sizes of the attention kernels for a chip"),
    "completion": Program("completion", "print the completion script for bash, zsh or fish"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand with the arguments after its name; returns its exit code, 2 for an unknown one."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name in ("--version", "version"):
        print(versions())
        return 0
    # A program's file may have a longer name: `bc2 tokenize-corpus` is `bc2 tokenize`.
    files = {program.module.replace("_", "-"): name for name, program in PROGRAMS.items() if not program.arguments}
    name = name if name in PROGRAMS else files.get(name, name)
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "bc2 --help lists them."
        print(f"error: bc2 has no subcommand {name!r}; {hint}", file=sys.stderr)
        return 2
    program = PROGRAMS[name]
    arguments = [*program.arguments, *rest]
    given = sys.argv
    sys.argv = [f"bc2 {name}", *arguments]  # the program's name in its --help and in its hints
    try:
        return importlib.import_module(f"bc2_jax.cli.{program.module}").main(arguments)
    finally:
        sys.argv = given


def usage() -> str:
    width = max(map(len, PROGRAMS))
    columns = shutil.get_terminal_size((100, 24)).columns
    lines = [
        textwrap.fill(
            f"  {name:{width}}  {program.summary}", columns, subsequent_indent=" " * (width + 4), break_long_words=False
        )
        for name, program in PROGRAMS.items()
    ]
    return "\n".join(
        [
            "usage: bc2 SUBCOMMAND [ARGUMENTS ...]", "", "Baichuan 2 in JAX.", "", *lines, "",
            "bc2 SUBCOMMAND --help documents a subcommand; bc2 --version prints versions.",
        ]
    )  # fmt: skip


def versions() -> str:
    """Versions of this library and of what computes, without importing JAX."""
    lines = [("bc2_jax", __version__)]
    for name in ("jax", "flax"):
        try:
            lines.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((name, "not installed"))
    return "\n".join(f"{name} {version}" for name, version in [*lines, ("python", platform.python_version())])
