"""What a run that resumes does otherwise than the run that saved its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from bc2_jax.agreement import flatten
from bc2_jax.config import RunConfig
from bc2_jax.config.record import from_record
from bc2_jax.metadata import Metadata
from bc2_jax.terminal import make_table
from bc2_jax.train.kinds import type_of_record

Effect = Literal["harmless", "changes what is learnt", "refused"]

# The first that a field is, or begins with, counts; another field of a kind of run changes what is learnt.
_EFFECTS: tuple[tuple[Effect, tuple[str, ...]], ...] = (
    ("harmless", ("model.initializer_range", "model.model_max_length", "data.accumulation_steps", "health.norms")),
    (
        "changes what is learnt",
        ("model.z_loss_weight", "compute.dtype", "lora.dropout", "ppo.prompts_per_step", "ppo.reward_model_weight"),
    ),
    ("refused", ("model.", "lora.", "ppo.algorithm")),
    (
        "harmless",
        (
            "name", "compute.", "mesh.", "distributed.", "checkpoint.", "num_steps", "workdir", "init_from", "seed",
            "compilation_cache", "log_every", "wandb_project", "eval_", "evaluate.", "verify_resume_steps", "profile_",
            "sample.", "ngram_baselines", "export_hf", "data.max_bad_rows", "data.tokenizer", "allow_other_tokenizer",
            "questions.", "num_epochs", "dpo.reference_cache",
            # Told apart by what is in them.
            "tokenizer", "ppo.prompts", "ppo.reward_model", "ppo.rollout_rows", "ppo.patience",
            "ppo.keep_rollouts_every",
        ),
    ),
)  # fmt: skip
# How this start was called, and where its processes are.
_OF_THE_START = ("resume", "workdir", "distributed.")


class Change(NamedTuple):
    """A field whose value is another than that of the run that saved the checkpoint."""

    field: str
    before: str
    now: str
    effect: Effect


def list_changes(config: RunConfig, metadata: Metadata) -> list[Change]:
    """Every changed field but those that say how this start was called, in the order of their names.

    The paths of data and tokenizers are harmless as such; what is in them is compared by its hash elsewhere.
    """
    try:
        saved = dataclasses.asdict(from_record(type(config), metadata.config))
    except (ValueError, TypeError):  # of another version: what it did not know is named
        saved = metadata.config
    before, now = (dict(flatten(json.loads(json.dumps(c)))) for c in (saved, dataclasses.asdict(config)))
    names = [n for n in sorted(before | now) if not n.startswith(_OF_THE_START) and before.get(n) != now.get(n)]
    return [Change(name, _show(before, name), _show(now, name), effect_of(name)) for name in names]


def effect_of(field: str) -> Effect:
    """What a change of a field does to a run that resumes."""
    if field.startswith("data.sources.") and field.endswith((".path", ".max_epochs")):
        return "harmless"
    fitting = (effect for effect, prefixes in _EFFECTS if field.startswith(prefixes))
    return next(fitting, "changes what is learnt")


def check_changes(config: RunConfig, metadata: Metadata, workdir: Path, changes: Sequence[Change]) -> None:
    """Raises ValueError, naming the fields, if a run of `config` cannot go on from the checkpoints in `workdir`."""
    saved = type_of_record(metadata.config)
    if saved not in (None, type(config)):
        raise ValueError(
            f"workdir = '{workdir}' is not valid: its checkpoints are of a {saved.__name__}, this run is of a "
            f"{type(config).__name__}; give it a workdir of its own, and the model that it starts from as init_from."
        )
    if lines := [f"{c.field}: {c.now} is {c.before} in them" for c in changes if c.effect == "refused"]:
        raise ValueError(f"The checkpoints in '{workdir}' are of another run; these fields differ: {'; '.join(lines)}.")


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """A table of them; nothing if there are none."""
    if not changes:
        return
    table = make_table("field", "before", "now", "effect", title="Changed at this resume")
    for change in changes:
        table.add_row(*map(Text, change))
    console.print(table)


def _show(values: dict[str, object], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"
