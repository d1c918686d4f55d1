"""Resuming a run: its checkpoint, the restored state, changes of the config, and a check that it is bit-exact."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.text import Text

from bc2_jax.agreement import first_decides, flatten
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import RunConfig
from bc2_jax.config.record import from_record
from bc2_jax.metadata import Metadata
from bc2_jax.model.baichuan import Params
from bc2_jax.terminal import make_table
from bc2_jax.train.goodput import Goodput
from bc2_jax.train.job import Job, Say, TrainState, TrainStep
from bc2_jax.train.kinds import type_of_record
from bc2_jax.train.metrics import fingerprint

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
            "compilation_cache", "log_every", "wandb_project", "eval_", "evaluate.", "verify_resume_steps", "profile_",
            "sample.", "ngram_baselines", "export_hf", "data.max_bad_rows", "data.tokenizer", "allow_other_tokenizer",
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
            f"workdir = '{workdir}' is not valid: its checkpoints are of a {saved.__name__}, this run is of a "
            f"{type(config).__name__}; choose another workdir, and pass the model to start from as init_from."
        )
    # Between float32 and bfloat16 restoring casts; 8-bit moments are another tree of arrays.
    cast = {'"float32"', '"bfloat16"'}
    refused = [
        c
        for c in changes
        if c.effect == "refused" or (c.field == "optimizer.moment_dtype" and not {c.before, c.now} <= cast)
    ]
    if lines := [f"{c.field}: {c.now} is {c.before} in them" for c in refused]:
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


def find_checkpoint(
    config: RunConfig, checkpointer: Checkpointer, goodput: Goodput, verified: bool = True
) -> tuple[int, Metadata | None]:  # fmt: skip
    """Step and metadata of the checkpoint to resume from, or (0, None). Raises ValueError if the run may not resume.

    With `verified` = False its arrays are left for `Checkpointer.restore` to verify.
    """
    workdir = goodput.path.parent
    saved = first_decides(checkpointer.steps)
    if saved and config.resume == "never":
        raise ValueError(
            f"workdir = '{workdir}' already holds checkpoints up to step {saved[-1]}; "
            "pass --resume auto to resume from there, or another --workdir."
        )
    with goodput.phase("restore"):
        step = goodput.start_step = checkpointer.latest_good(verified) or 0
    if step > config.num_steps:
        raise ValueError(f"num_steps = {config.num_steps} is not valid: the run in '{workdir}' is at {step}.")
    return step, checkpointer.metadata(step) if step else None


class Restorer(Protocol):
    """A Checkpointer, or another reader of its checkpoints."""

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]: ...


def restore_state(checkpointer: Restorer, step: int, abstract: TrainState) -> TrainState:
    """The state saved at a step, on the mesh of `abstract`, whatever mesh it was saved on."""
    params, opt_state = checkpointer.restore(step, abstract.params, abstract.opt_state)
    # Skipped updates are not counted, so this is not the step. A copy, because the step donates both.
    count = next(
        leaf for path, leaf in jax.tree.leaves_with_path(opt_state) if jax.tree_util.keystr(path).endswith(".count")
    )
    return TrainState(params, opt_state, jax.device_put(jnp.copy(count), abstract.step.sharding))


def verify_resume(
    job: Job, train_step: TrainStep, checkpointer: Checkpointer, step: int, last: int, uninterrupted: str, say: Say
) -> None:
    """Repeats the steps from the checkpoint of `step` to `last` and checks that the parameters are the same bits.

    Raises ArithmeticError unless their SHA-256 is `uninterrupted`.
    """
    again = restore_state(checkpointer, step, job.abstract_state)
    job.batches.seek(checkpointer.metadata(step).data)
    for number in range(step + 1, last + 1):
        if (batch := job.batches.next(number, again)) is None:
            say("Exact resume was not verified: the run is stopping.")
            return
        again, _ = train_step(again, job.frozen, batch)
    resumed = fingerprint(again.params)
    if resumed != uninterrupted:
        raise ArithmeticError(
            f"The resume is not exact: from step {step} the run ended in {resumed}, without a stop in {uninterrupted}."
        )
    say(f"Resumed at step {step} and repeated: the parameters are the same bit for bit.")
