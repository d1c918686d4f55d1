"""Which changes of the data a run notices that goes on from a checkpoint, and that the loader agrees."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config import DataConfig, MixtureStage, SourceConfig
from bc2_jax.data.loader import changed_row_order, make_train_loader, record_row_order
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

T, STEP = 16, 4


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows")
    for name, text in zip("ab", modules, strict=False):
        pack_texts([text[i : i + 300] for i in range(0, 6000, 300)], tokenizer, folder / name, T)
    sources = (SourceConfig(path=str(folder / "a"), weight=2.0), SourceConfig(path=str(folder / "b")))
    return DataConfig(sources=sources, tokenizer=str(tokenizer.path), sequence_length=T, global_batch_size=4)


def rows(data: DataConfig) -> np.ndarray:
    """The first rows after STEP steps."""
    loader = make_train_loader(data, process_index=0, process_count=1)
    return np.concatenate([loader[STEP + i]["input_ids"] for i in range(4)])[:16]


def other_rows(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> DataConfig:
    pack_texts(["something else"] * 50, tokenizer, folder / "c", T)
    return with_source(data, path=str(folder / "c"))


def with_source(data: DataConfig, **fields) -> DataConfig:
    return dataclasses.replace(data, sources=(dataclasses.replace(data.sources[0], **fields), data.sources[1]))


def stage(after_steps: int) -> tuple[MixtureStage, ...]:
    return (MixtureStage(start_tokens=after_steps * 4 * T, weights=(1.0, 5.0)),)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda d, *_: dataclasses.replace(d, seed=1), ["data.seed"]),
        (lambda d, *_: with_source(d, weight=1.0), ["data.sources.0.weight"]),
        (lambda d, *_: dataclasses.replace(d, stages=stage(STEP - 2)), ["data.stages"]),
        (other_rows, ["data.sources.0.rows"]),
        (
            lambda d, *_: dataclasses.replace(d, sources=d.sources[:1]),
            ["data.sources.1.quality_weights", "data.sources.1.rows", "data.sources.1.weight"],
        ),
    ],
)
def test_a_change_of_the_rows_is_named(data, tokenizer, tmp_path, change, names):
    recorded = json.loads(json.dumps(record_row_order(data)))
    changed = change(data, tokenizer, tmp_path)
    assert changed_row_order(recorded, changed, STEP * 4 * T) == names
    assert not np.array_equal(rows(changed), rows(data))


@pytest.mark.parametrize("change", ["the same", "moved", "a later stage", "accumulation", "an earlier version"])
def test_what_changes_no_row_is_not_named(data, tmp_path, change):
    recorded = json.loads(json.dumps(record_row_order(data)))
    changed = data
    if change == "moved":
        changed = with_source(data, path=str(shutil.copytree(data.sources[0].path, tmp_path / "moved")))
    elif change == "a later stage":
        changed = dataclasses.replace(data, stages=stage(STEP + 4))
    elif change == "accumulation":
        changed = dataclasses.replace(data, accumulation_steps=2)
    elif change == "an earlier version":
        recorded["data.global_batch_size"] = 8
    assert changed_row_order(recorded, changed, STEP * 4 * T) == []
    np.testing.assert_array_equal(rows(changed), rows(data))
