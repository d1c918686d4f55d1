"""The whole way from files of pairs to batches; what is held out, left out and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bc2_jax.align.formats import Sample, read_samples
from bc2_jax.align.pair_preparation import prepare_sources
from bc2_jax.align.pair_rows import as_pair, encode_pairs, split_pair
from bc2_jax.align.pairs import most_pairs
from bc2_jax.align.preparation_settings import RowSettings
from bc2_jax.align.row_preparation import prepare_pairs
from bc2_jax.config import DataConfig, DPOConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.data.inspection import inspect_sources
from bc2_jax.data.loader import make_train_loader, make_validation_batches
from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.data.row_file import START, token_ids
from bc2_jax.data.row_stream import find_sources, read_document, stream_tokens
from bc2_jax.data.row_values import RowValues
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.checks import check_row_kinds

LENGTH = 64
MODEL = ModelConfig(
    vocab_size=640, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    position_embedding="rope",
)  # fmt: skip
RUN: dict[str, Any] = {"name": "test", "model": MODEL, "num_steps": 1}


def make_records() -> list[dict[str, Any]]:
    """60 pairs to 15 first questions, some of several turns, with margins, fields and shapes that differ."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(60):
        question = f"{number % 15} " + "how " * (1 + number % 15 % 4)
        chosen, rejected = (f"{number}{name} " + "so " * int(rng.integers(1, 6)) for name in ("c", "r"))
        record: dict[str, Any] = {"prompt": question, "chosen": chosen, "rejected": rejected, "class": f"k{number % 3}"}
        if number % 4 == 1:
            asked = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
            asked.append({"role": "user", "content": "that"})
            both = ({"role": "assistant", "content": text} for text in (chosen, rejected))
            record |= zip(("chosen", "rejected"), ([*asked, answer] for answer in both), strict=True)
            del record["prompt"]
        if number % 2:
            record |= {"score_chosen": number, "score_rejected": number / 2}
        records.append(record)
    return records


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Rows of the records and of some that are not pairs, beside the file."""
    folder = tmp_path_factory.mktemp("pairs")
    bad = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}]
    same = [{"prompt": "a", "chosen": "x " * 40 + end, "rejected": "x " * 40 + "no"} for end in ("yes", "so")]
    write(folder / "data.jsonl", [*bad, *make_records(), *same])
    settings = RowSettings(max_length=LENGTH - 8, row_length=LENGTH, validation_fraction=0.2)
    counts = prepare_pairs([folder / "data.jsonl"], tokenizer.path, folder / "rows", settings)
    assert (counts.samples, counts.pairs, counts.margins) == (60, 60, 30)
    assert sum(counts.invalid.values()) == sum(counts.dropped.values()) == 2
    return folder / "rows"


def data_of(path: Path, tokenizer: Tokenizer) -> DataConfig:
    return DataConfig(
        sources=(SourceConfig(path=str(path)),), tokenizer=str(tokenizer.path), sequence_length=LENGTH,
        global_batch_size=1,
    )  # fmt: skip


def read_pairs(batch: dict[str, np.ndarray]) -> list[tuple[tuple[int, ...], ...]]:
    """Prompt, chosen and rejected tokens of each pair of a batch of one row."""
    ids, segments = batch["input_ids"][0], batch["segment_ids"][0]
    numbers = range(1, int((segments % 2**24).max(initial=0)) + 1)
    return [tuple(tuple(ids[segments == n + (k << 24)].tolist()) for k in range(3)) for n in numbers]


def samples_of(path: Path) -> list[Sample]:
    return [found for found in map(as_pair, read_samples([path])) if isinstance(found, Sample)]


def test_batches_have_each_pair_once(folder: Path, tokenizer: Tokenizer) -> None:
    data, manifest = data_of(folder, tokenizer), load_manifest(folder)
    assert (manifest.kind, manifest.sequence_length, manifest.documents) == ("pairs", LENGTH, 64)
    loader = make_train_loader(data, process_index=0, process_count=1)
    batches = {"train": [loader[i] for i in range(manifest.train.rows)], "validation": make_validation_batches(data, 1)}
    found = {split: [read_pairs(batch) for batch in here] for split, here in batches.items()}
    assert manifest.most_pairs == most_pairs(data) == max(len(row) for rows in found.values() for row in rows) > 1
    expected = []
    for sample in samples_of(folder.parent / "data.jsonl")[:60]:
        prompt, chosen, rejected = (
            [token for message in messages for token in (*[195 + (message["role"] == "assistant")],
             *tokenizer.encode(message["content"]))]
            for messages in split_pair(sample)
        )  # fmt: skip
        expected.append((tuple(prompt), (*chosen, 2), (*rejected, 2)))
    sides = {split: [pair for row in rows for pair in row] for split, rows in found.items()}
    assert sorted(sides["train"] + sides["validation"]) == sorted(expected)
    # All answers to what is first asked are on one side.
    first = {split: {tuple(tokenizer.decode(p[0][1:]).split()[:1]) for p in pairs} for split, pairs in sides.items()}
    assert len(sides["validation"]) >= 3 and not first["train"] & first["validation"]


def test_held_out_pairs_are_records_that_can_be_read_again(folder: Path, tokenizer: Tokenizer) -> None:
    held_out = samples_of(folder / "pairs.jsonl")
    assert len(held_out) == load_manifest(folder).validation.documents
    by_answer = {sample.messages[-1]["content"]: sample for sample in samples_of(folder.parent / "data.jsonl")}
    for sample in held_out:
        original = by_answer[sample.messages[-1]["content"]]
        plain = dataclasses.replace(original, where=sample.where, format=sample.format)
        assert sample == plain and "class" in sample.fields


def test_margins_stand_beside_the_rows(folder: Path, tokenizer: Tokenizer) -> None:
    values = RowValues.load(folder / "margins.npz")
    assert values.width == load_manifest(folder).most_pairs
    samples = samples_of(folder.parent / "data.jsonl")[:60]
    tokens = {tuple(encode_pairs(tokenizer, [split_pair(s)], LENGTH, LENGTH).tokens.tolist()): s for s in samples}
    batches = make_validation_batches(data_of(folder, tokenizer), 1)
    rows = read_rows(folder, "validation")
    assert len(rows) == len(batches)
    for row, batch in zip(rows, batches, strict=True):
        starts = np.flatnonzero(row & START)
        pairs = np.split(row[: np.flatnonzero(row)[-1] + 1], starts[1:])
        expected = [tokens[tuple(pair.tolist())].margin or 0 for pair in pairs]
        np.testing.assert_array_equal(values.lookup(batch)[0], expected + [0] * (values.width - len(expected)))


def test_what_was_lost_is_named(folder: Path) -> None:
    problems = (folder / "problems.txt").read_text()
    name = folder.parent / "data.jsonl"
    assert f"{name}:1: left out: not a preference pair (chosen and rejected are needed)\n" in problems
    assert f"{name}:2: left out: margin is not a finite number ('much')\n" in problems
    assert f"{name}:63: left out: chosen and rejected are the same tokens (max_length = 56; " in problems


def test_pairs_are_read_as_documents(folder: Path, tokenizer: Tokenizer) -> None:
    [source] = find_sources([folder])
    found = inspect_sources([source])
    assert not found.differences and not found.exact
    start, row = next(stream_tokens(source, "train"))
    first = token_ids(np.split(row, np.flatnonzero(row & START)[1:])[0])
    assert read_document(source, "train", start, 1000).tolist() == first[:-1].tolist()


def test_files_are_packed_once_and_rows_are_taken_as_they_are(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    shutil.copy(folder.parent / "data.jsonl", file)
    sources = tuple(SourceConfig(path=str(path), weight=w) for path, w in ((file, 2.0), (folder, 1.0)))
    data = dataclasses.replace(data_of(folder, tokenizer), sources=sources)
    config = DPOConfig(**RUN, data=data, init_from="x")
    done = prepare_sources(config, cache)
    made = Path(done.data.sources[0].path)
    assert made.parent == cache / "pairs" and load_manifest(made).kind == "pairs"
    assert done == dataclasses.replace(
        config, data=dataclasses.replace(data, sources=(dataclasses.replace(sources[0], path=str(made)), sources[1]))
    )
    check_row_kinds(done)
    before = (made / "manifest.json").stat().st_mtime_ns
    assert prepare_sources(config, cache) == prepare_sources(done, cache) == done
    assert (made / "manifest.json").stat().st_mtime_ns == before
    write(file, make_records()[:9])
    other = Path(prepare_sources(config, cache).data.sources[0].path)
    assert other != made and load_manifest(other).train.documents < 9


def test_rows_of_another_kind_are_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", [{"prompt": f"{i}", "completion": "b"} for i in range(9)])
    data = data_of(folder, tokenizer)
    text = TrainConfig(**RUN, data=data)
    legal = "it has rows of pairs of answers .* and a TrainConfig trains on text or conversations"
    with pytest.raises(ValueError, match=f"data.sources.0.path = {str(folder)!r} is not valid: {legal}"):
        check_row_kinds(text)
    with pytest.raises(ValueError, match=r"no sample is left to train on \(9 x not a preference pair\)"):
        chat = dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "chat.jsonl")),))
        prepare_sources(DPOConfig(**RUN, data=chat, init_from="x"), tmp_path / "cache")
    with pytest.raises(ValueError, match="data.sources.0.path = .*nothing.* is not valid: there is no such file"):
        missing = dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "nothing")),))
        prepare_sources(DPOConfig(**RUN, data=missing, init_from="x"), tmp_path / "cache")
