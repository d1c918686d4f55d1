"""The table of kinds of run, and configs read back as the kind that wrote them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bc2_jax.config import FineTuneConfig, LoraConfig
from bc2_jax.train.kinds import KINDS, kind_of, read_config, type_of_record
from bc2_jax.train.resume import Change, check_changes


def fine_tuning(config) -> FineTuneConfig:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return FineTuneConfig(**fields, lora=LoraConfig(rank=2, ranks=(2, 3), targets=("o_proj", "W_pack")))


def test_a_record_is_read_as_the_kind_that_wrote_it(small_run):
    for config in (small_run, fine_tuning(small_run)):
        record = json.loads(json.dumps(dataclasses.asdict(config)))
        assert read_config(record) == config and type_of_record(record) is type(config)
        assert all(callable(getattr(kind_of(config), name)) for name in ("complete", "make_job", "make_step"))
    assert type_of_record(record | {"unknown": 1}) is None
    with pytest.raises(ValueError, match="this version has no such field"):
        read_config(record | {"unknown": 1})


def test_no_kind_hides_another():
    """The first that has all fields of a record is chosen."""
    names = [{field.name for field in dataclasses.fields(kind)} for kind in KINDS]
    assert all(not later <= earlier for i, earlier in enumerate(names) for later in names[i + 1 :])


def test_changes_that_are_refused_are_named(small_run, tmp_path):
    class Saved:
        config = dataclasses.asdict(fine_tuning(small_run))

    now = fine_tuning(small_run)
    check_changes(now, Saved, tmp_path, [Change("seed", "1", "2", "harmless")])
    with pytest.raises(ValueError, match="of another run; these fields differ: lora.rank: 3 is 2 in them"):
        check_changes(now, Saved, tmp_path, [Change("lora.rank", "2", "3", "refused")])
    with pytest.raises(ValueError, match="are of a FineTuneConfig, this run is of a TrainConfig"):
        check_changes(small_run, Saved, tmp_path, [])
