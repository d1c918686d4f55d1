"""What runs from a base model have in common: steps of their epochs, the checksum of what is frozen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bc2_jax.align import tuning
from bc2_jax.config import BAICHUAN2_7B, DataConfig, FineTuneConfig, OptimizerConfig, SourceConfig
from bc2_jax.data.loader import PartUse

CONFIG = FineTuneConfig(
    name="test", model=BAICHUAN2_7B, init_from="base", num_steps=1,
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="none", global_batch_size=4),
)  # fmt: skip


def test_epochs_become_steps(monkeypatch):
    uses = [PartUse("a", rows, (0.5,), 0, "chat") for rows in (30, 11)]
    monkeypatch.setattr(tuning, "describe_mixture", lambda data, rows: uses)
    config = dataclasses.replace(CONFIG, num_epochs=1.5, num_steps=1000, optimizer=OptimizerConfig(warmup_steps=2))
    done = tuning.complete(config)
    assert (done.num_steps, done.optimizer.decay_steps) == (16, 16)  # 1.5 * 41 / 4
    assert tuning.complete(dataclasses.replace(config, num_steps=7)).num_steps == 7
    assert tuning.complete(dataclasses.replace(config, num_epochs=None)) == dataclasses.replace(config, num_epochs=None)
    with pytest.raises(ValueError, match="optimizer.warmup_steps = 20 is not valid: it must be less than decay_steps"):
        tuning.complete(dataclasses.replace(config, optimizer=OptimizerConfig(warmup_steps=20)))
    with pytest.raises(ValueError, match="init_from = None is not valid: fine-tuning needs the base model"):
        tuning.complete(dataclasses.replace(config, init_from=None))


def test_the_checksum_sees_a_bit_and_a_place():
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    swapped = {"a": params["a"][::-1].copy(), "b": params["b"]}
    moved = {"a": params["a"], "b": np.nextafter(params["b"], np.float32(2))}
    renamed = {"b": params["a"], "a": params["b"]}
    assert len({tuning.checksum(p) for p in (params, swapped, moved, renamed)}) == 4
