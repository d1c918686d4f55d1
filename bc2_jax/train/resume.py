"""What has changed in the config of a run that resumes."""

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

# The first entry that equals the field or is a prefix of it counts; other fields change what is learnt.
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
            "compilation_cache", "log_every", "eval_", "evaluate.", "verify_resume_steps", "profile_", "sample.",
            "ngram_baselines", "export_hf", "data.max_bad_rows", "data.tokenizer", "allow_other_tokenizer",
            "questions.", "num_epochs", "dpo.reference_cache",
            # Compared by their contents.
            "tokenizer", "ppo.prompts", "ppo.reward_model", "ppo.rollout_rows", "ppo.patience",
            "ppo.keep_rollouts_every",
        ),
    ),
)  # fmt: skip
# How this start was called and where its processes are.
_OF_THE_START = ("resume", "workdir", "distributed.")


class Change(NamedTuple):
    """A field whose value differs from that of the run that saved the checkpoint."""

    field: str
    before: str
    now: str
    effect: Effect


def list_changes(config: RunConfig, metadata: Metadata) -> list[Change]:
    """All changed fields, sorted by name, except those that describe this start.

    Paths of data and tokenizers count as harmless; their contents are compared by hash elsewhere.
    """
    try:
        saved = dataclasses.asdict(from_record(type(config), metadata.config))
    except (ValueError, TypeError):  # of another version: its missing fields are listed
        saved = metadata.config
    before, now = (dict(flatten(json.loads(json.dumps(c)))) for c in (saved, dataclasses.asdict(config)))
    names = [n for n in sorted(before | now) if not n.startswith(_OF_THE_START) and before.get(n) != now.get(n)]
    return [Change(name, _show(before, name), _show(now, name), effect_of(name)) for name in names]


def effect_of(field: str) -> Effect:
    """The effect of changing a field on a run that resumes."""
    if field.startswith("data.sources.") and field.endswith((".path", ".max_epochs")):
        return "harmless"
    fitting = (effect for effect, prefixes in _EFFECTS if field.startswith(prefixes))
    return next(fitting, "changes what is learnt")


def check_changes(config: RunConfig, metadata: Metadata, workdir: Path, changes: Sequence[Change]) -> None:
    """Raises ValueError, naming the fields, if a run of `config` cannot resume from the checkpoints in `workdir`."""
    saved = type_of_record(metadata.config)
    if saved not in (None, type(config)):
        raise ValueError(
            f"workdir = '{workdir}' is not valid: its checkpoints are of a {saved.__name__}, this run is a "
            f"{type(config).__name__}; choose another workdir, and pass the model to start from as init_from."
        )
    if lines := [f"{c.field}: {c.now} is {c.before} in them" for c in changes if c.effect == "refused"]:
        raise ValueError(f"The checkpoints in '{workdir}' are of another run; these fields differ: {'; '.join(lines)}.")


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """Prints them as a table; nothing if there are none."""
    if not changes:
        return
    table = make_table("field", "before", "now", "effect", title="Changed at this resume")
    for change in changes:
        table.add_row(*map(Text, change))
    console.print(table)


def _show(values: dict[str, object], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"
