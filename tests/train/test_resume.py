from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from bc2_jax.agreement import flatten
from bc2_jax.metadata import Metadata
from bc2_jax.train.resume import Change, check_changes, effect_of, list_changes, print_changes


def saved(config) -> Metadata:
    return Metadata(json.loads(json.dumps(dataclasses.asdict(config))), {})


def test_nothing_changed_is_no_table(small_run):
    changes = list_changes(dataclasses.replace(small_run, resume="auto", workdir="elsewhere"), saved(small_run))
    assert changes == []
    console = Console(file=io.StringIO())
    print_changes(console, changes)
    assert console.file.getvalue() == ""


def test_every_changed_field_is_named_with_what_it_does(small_run):
    now = dataclasses.replace(
        small_run,
        name="[b]other[/b]",
        optimizer=dataclasses.replace(small_run.optimizer, peak_learning_rate=0.5),
        data=dataclasses.replace(small_run.data, global_batch_size=16, sources=(*small_run.data.sources,) * 2),
        model=dataclasses.replace(small_run.model, num_hidden_layers=3, z_loss_weight=0.5),
        num_steps=9,
    )
    changes = list_changes(now, saved(small_run))
    path = json.dumps(small_run.data.sources[0].path)
    assert [change for change in changes if not change.field.startswith("data.sources.1.")] == [
        Change("data.global_batch_size", "8", "16", "changes what is learnt"),
        Change("model.num_hidden_layers", "2", "3", "refused"),
        Change("model.z_loss_weight", "0.0002", "0.5", "changes what is learnt"),
        Change("name", '"test"', '"[b]other[/b]"', "harmless"),
        Change("num_steps", "8", "9", "harmless"),
        Change("optimizer.peak_learning_rate", "0.01", "0.5", "changes what is learnt"),
    ]
    assert Change("data.sources.1.path", "not set", path, "harmless") in changes
    assert Change("data.sources.1.weight", "not set", "1.0", "changes what is learnt") in changes
    console = Console(file=io.StringIO(), width=200)
    print_changes(console, changes)
    text = console.file.getvalue()
    assert all(change.field in text and change.now in text for change in changes)


def test_a_checkpoint_of_a_version_that_lacked_fields_has_their_defaults(small_run):
    metadata = saved(small_run)
    del metadata.config["health"], metadata.config["optimizer"]["moment_dtype"], metadata.config["eval_batches"]
    assert list_changes(small_run, metadata) == []
    metadata.config["optimizer"]["momentum"] = 0.9  # of another version
    assert Change("optimizer.momentum", "0.9", "not set", "changes what is learnt") in list_changes(small_run, metadata)


@pytest.mark.parametrize(("before", "now", "refused"), [
    ("float32", "bfloat16", False), ("float32", "int8", True), ("int8", "bfloat16", True),
])  # fmt: skip
def test_8_bit_moments_resume_only_as_such(small_run, tmp_path, before: str, now: str, refused: bool):
    """Orbax casts between float dtypes; codes and scales are other arrays."""
    configs = [
        dataclasses.replace(
            small_run,
            optimizer=dataclasses.replace(small_run.optimizer, moment_dtype=x, stochastic_rounding=x == "int8"),
        )
        for x in (before, now)
    ]
    metadata = saved(configs[0])
    changes = list_changes(configs[1], metadata)
    if not refused:
        return check_changes(configs[1], metadata, tmp_path, changes)
    with pytest.raises(ValueError, match=f'optimizer.moment_dtype: "{now}" is "{before}" in them'):
        check_changes(configs[1], metadata, tmp_path, changes)


LEARNT = {
    "compute.dtype", "data.global_batch_size", "data.seed", "data.sequence_length", "data.sources.0.weight",
    "data.sources.0.quality_weights", "data.stages", "model.z_loss_weight", "health.max_skipped_updates",
    "health.max_rewinds",
}  # fmt: skip


def test_each_field_has_the_effect_it_should(small_run):
    """What is computed of the same rows is harmless; an unknown field is not taken for harmless."""
    effects = {name: effect_of(name) for name, _ in flatten(dataclasses.asdict(small_run)) if name != "resume"}
    learnt = {name for name, effect in effects.items() if effect == "changes what is learnt"}
    assert learnt >= LEARNT
    assert learnt - LEARNT == {n for n in effects if n.startswith(("optimizer.", "health.spike_"))}
    refused = {name for name, effect in effects.items() if effect == "refused"}
    assert refused == {n for n in effects if n.startswith("model.")} - {
        "model.z_loss_weight", "model.initializer_range", "model.model_max_length"
    }  # fmt: skip
    assert effect_of("reward.margin") == "changes what is learnt"


@pytest.mark.parametrize("field", ["seed", "mesh.fsdp", "log_every", "data.tokenizer", "sample.top_p"])
def test_these_are_harmless(field):
    assert effect_of(field) == "harmless"


def test_fields_of_fine_tuning():
    """An adapter of another rank or scaling is another one; what is asked of the model changes nothing."""
    effects: dict[str, list[str]] = {"harmless": [], "changes what is learnt": [], "refused": []}
    fields = ("lora.rank", "lora.alpha", "lora.targets.0", "lora.dora", "lora.dropout", "loss_weighting", "num_epochs",
              "neftune_alpha", "questions.path", "questions.limit")  # fmt: skip
    for field in fields:
        effects[effect_of(field)].append(field)
    assert effects["refused"] == ["lora.rank", "lora.alpha", "lora.targets.0", "lora.dora"]
    assert effects["changes what is learnt"] == ["lora.dropout", "loss_weighting", "neftune_alpha"]
