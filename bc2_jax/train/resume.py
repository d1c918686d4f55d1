"""What a run that resumes does otherwise than the run that saved its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from bc2_jax.agreement import flatten
from bc2_jax.config import RunConfig
from bc2_jax.config.record import from_record
from bc2_jax.metadata import Metadata
from bc2_jax.terminal import make_table

Effect = Literal["harmless", "changes what is learnt", "refused"]

# The first that a field is, or begins with, counts; another field of a kind of run changes what is learnt.
_EFFECTS: tuple[tuple[Effect, tuple[str, ...]], ...] = (
    ("harmless", ("model.initializer_range", "model.model_max_length", "data.accumulation_steps", "health.norms")),
    ("changes what is learnt", ("model.z_loss_weight", "compute.dtype")),
    ("refused", ("model.",)),
    (
        "harmless",
        (
            "name", "compute.", "mesh.", "distributed.", "checkpoint.", "num_steps", "workdir", "init_from", "seed",
            "compilation_cache", "log_every", "eval_", "verify_resume_steps", "profile_", "sample.", "ngram_baselines",
            "export_hf", "data.max_bad_rows", "data.tokenizer", "allow_other_tokenizer",
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
