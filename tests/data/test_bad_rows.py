"""Rows that can't be read: counted once, and padding in their places while the config allows it."""

from __future__ import annotations

import collections
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches
from bc2_jax.data.packing import Split, load_manifest, read_rows
from bc2_jax.data.row_file import BadRow, BadRows
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

T = 16
ONE = {"process_index": 0, "process_count": 1}

places = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3)), max_size=20)


@given(places, st.integers(0, 8))
def test_each_row_counts_once(found: list[tuple[str, int]], limit: int) -> None:
    bad_rows = BadRows(limit)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bc2_jax.data.row_file").addHandler(handler)
    allowed: list[tuple[str, int]] = []
    try:
        for name, row in found:
            bad = BadRow(Path(name), row, "why")
            if (name, row) in allowed or len(allowed) < limit:
                bad_rows.add(bad)
                allowed += [(name, row)] * ((name, row) not in allowed)
            else:
                with pytest.raises(
                    ValueError, match=rf"row {row} of '{name}' .*\(why\).* data.max_bad_rows = {limit} allows no more"
                ):
                    bad_rows.add(bad)
    finally:
        logging.getLogger("bc2_jax.data.row_file").removeHandler(handler)
    assert bad_rows.metrics() == ({"bad_rows": len(allowed)} if allowed else {})
    assert lines == [
        f"row {row} of '{name}' can't be read (why): padding takes its place; bad row {number} of at most "
        f"data.max_bad_rows = {limit}."
        for number, (name, row) in enumerate(allowed, 1)
    ]


def test_a_negative_limit() -> None:
    with pytest.raises(ValueError, match="data.max_bad_rows = -1 is not valid: it must be at least 0"):
        DataConfig(sources=(SourceConfig(path="a"),), tokenizer="t", max_bad_rows=-1)


@pytest.fixture
def data(tokenizer: Tokenizer, tmp_path: Path) -> DataConfig:
    """Rows of random numbers, so that no two are the same, in two sources of three files."""
    random = np.random.default_rng(0)
    for name in "ab":
        texts = [" ".join(map(str, random.integers(10**9, size=12))) for _ in range(60)]
        pack_texts(texts, tokenizer, tmp_path / name, T, validation_fraction=0.2, rows_per_file=120)
    return DataConfig(
        sources=tuple(SourceConfig(path=str(tmp_path / name)) for name in "ab"), tokenizer=str(tokenizer.path),
        sequence_length=T, global_batch_size=4, max_bad_rows=3,
    )  # fmt: skip


def damage(path: str, split: Split, rows: Iterable[int]) -> dict[bytes, int]:
    """Flips a bit of each of these rows of the first file; returns their numbers by their input_ids in a batch."""
    file = Path(path, load_manifest(path).split(split).files[0].name)
    content, stored = bytearray(file.read_bytes()), read_rows(path, split)
    for row in rows:
        assert content.count(stored[row].tobytes()) == 1
        content[content.index(stored[row].tobytes()) + 9] ^= 1
    file.write_bytes(content)
    return {stored[row, :-1].tobytes(): row for row in rows}


def test_padding_takes_their_places_and_no_other_row_moves(data: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    steps = 3 * sum(len(read_rows(source.path, "train")) for source in data.sources) // 4
    loader = make_train_loader(data, **ONE)
    expected = [row for step in range(steps) for row in loader[step]["input_ids"]]
    validation = make_validation_batches(data, 4)
    held_out = [row for step in range(len(validation)) for row in validation[step]["input_ids"]]
    bad_rows = BadRows(3)
    loader = make_train_loader(data, **ONE, bad_rows=bad_rows)
    validation = make_validation_batches(data, 4, bad_rows=bad_rows)
    first, second = (source.path for source in data.sources)
    lost = {*damage(first, "train", [5]), *damage(second, "train", [0])}
    (lost_held_out,) = damage(second, "validation", [2])

    seen: collections.Counter[bytes] = collections.Counter()
    for _ in range(2):  # as after a rewind, and as evaluations do
        for step in range(steps):
            batch = loader[step]
            for index in range(4):
                before = expected[4 * step + index]
                if before.tobytes() in lost:
                    seen[before.tobytes()] += 1
                    assert (batch["labels"][index] == -100).all() and not batch["input_ids"][index].any()
                    assert not batch["segment_ids"][index].any() and not batch["positions"][index].any()
                else:
                    np.testing.assert_array_equal(batch["input_ids"][index], before)
        for step in range(len(validation)):
            for index, row in enumerate(validation[step]["input_ids"]):
                before = held_out[4 * step + index]
                np.testing.assert_array_equal(row, 0 * before if before.tobytes() == lost_held_out else before)
    assert seen.keys() == lost and min(seen.values()) >= 4, "some epochs"
    assert bad_rows.metrics() == {"bad_rows": 3}
    assert len(caplog.records) == 3 and len({record.getMessage() for record in caplog.records}) == 3


def test_one_too_many_ends_the_iterator_and_after_a_repair_it_goes_on(data: DataConfig, tmp_path: Path) -> None:
    whole = make_train_iterator(make_train_loader(data, **ONE))
    expected = [next(whole)["input_ids"] for _ in range(100)]
    whole.close()
    shutil.copytree(data.sources[0].path, tmp_path / "copy")
    bad_rows = BadRows(3)
    iterator = make_train_iterator(make_train_loader(data, **ONE, bad_rows=bad_rows))
    rows = damage(data.sources[0].path, "train", range(0, 40, 3))
    read, state = [], {}
    with pytest.raises(ValueError) as error:
        while True:
            state = iterator.get_state()
            read.append(next(iterator)["input_ids"])
    iterator.close()
    pattern = r"^row (\d+) of '.*' can't be read \(.*\): .*, and data.max_bad_rows = 3 allows no more\.$"
    (named,) = re.findall(pattern, str(error.value))
    bad = [rows[row.tobytes()] for batch in expected for row in batch if row.tobytes() in rows]
    assert int(named) == bad[3] and bad_rows.metrics() == {"bad_rows": 3}
    assert state == {"next_index": len(read)}

    shutil.rmtree(data.sources[0].path)
    (tmp_path / "copy").rename(data.sources[0].path)
    again = make_train_iterator(make_train_loader(data, **ONE))
    again.set_state(state)
    for batch in expected[len(read) :]:
        np.testing.assert_array_equal(next(again)["input_ids"], batch)
    again.close()
