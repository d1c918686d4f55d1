"""Where a run is in its rows, whatever was left out and however the size of its batches changes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, MeshConfig, SourceConfig
from bc2_jax.data.loader import make_train_loader
from bc2_jax.data.row_batches import RowBatches, Stretch, in_rows, merge, next_row, row_of_step
from bc2_jax.data.row_file import BadRows
from bc2_jax.sharding import make_mesh
from tests.packed_rows import pack_texts

T = 16


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=5), st.integers(1, 7))
def test_whole_batches_pass_over_windows_of_whole_batches(spans, size):
    windows = merge([(first, first + length) for first, length in spans])
    left_out = {i for first, length in spans for i in range(first, first + length)}
    kept = [i * size for i in range(100) if i not in left_out]
    in_numbers = [(first * size, stop * size) for first, stop in windows]
    assert [row_of_step(s, [Stretch(1, 0, size)], in_numbers) for s in range(1, 51)] == kept[:50]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4), st.integers(1, 9), st.integers(0, 40))
def test_batches_of_any_size_have_no_row_twice_and_leave_few_out(spans, size, start):
    windows = merge([(first, first + length) for first, length in spans])
    left_out = {i for first, stop in windows for i in range(first, stop)}
    firsts = [row_of_step(step, [Stretch(5, start, size)], windows) for step in range(5, 40)]
    rows = [first + i for first in firsts for i in range(size)]
    assert len(set(rows)) == len(rows) and rows == sorted(rows) and not left_out & set(rows)
    missing = {i for i in range(start, rows[-1]) if i not in left_out} - set(rows)
    assert len(missing) <= (size - 1) * len(windows)


def make_data(tokenizer, folder, texts, **fields) -> DataConfig:
    pack_texts(texts, tokenizer, folder / "rows", T, validation_fraction=0)
    sources = (SourceConfig(path=str(folder / "rows")),)
    return DataConfig(sources=sources, tokenizer=str(tokenizer.path), sequence_length=T, **fields)


def test_other_batch_sizes_go_on_with_the_next_row(tokenizer, modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    data = make_data(tokenizer, folder, modules[:4], global_batch_size=1)
    loader = make_train_loader(data, process_index=0, process_count=1)
    mesh = make_mesh(MeshConfig(fsdp=8))

    def of_size(size: int) -> RowBatches:

        return RowBatches(dataclasses.replace(data, global_batch_size=size), mesh, 0, BadRows(0))

    @settings(max_examples=6, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([8, 16, 24, 40]), st.integers(1, 4)), min_size=2, max_size=4))
    def check(stretches):
        read, position, step = [], None, 0
        for size, count in stretches:
            batches = of_size(size)
            if position is not None:
                batches.seek(json.loads(json.dumps(position)))
            for _ in range(count):
                step += 1
                read += list(np.asarray(batches.next(step)["input_ids"]).reshape(-1, T))
                assert batches.metrics(step)["first_row"] == len(read) - size
            position = batches.position()
            batches.close()
            assert position["rows"] == position["next_row"] == len(read) == next_row(position, T)
        assert [row.tolist() for row in read] == [loader[i]["input_ids"][0].tolist() for i in range(len(read))]

    check()


def test_a_position_of_an_earlier_version_goes_on_where_it_was(tokenizer, modules, tmp_path):
    old = {"next_index": 9, "skipped_batches": [[3, 6]], "batch_size": 8, "row_tokens": T}
    now = in_rows(old)
    assert now["next_row"] == 72 and now["skipped_rows"] == [[24, 48]] and next_row(old, T) == 72
    data = make_data(tokenizer, tmp_path, modules[:4], global_batch_size=8)
    batches = RowBatches(data, make_mesh(MeshConfig(fsdp=8)), 0, BadRows(0))
    batches.seek(old)
    loader = make_train_loader(data, process_index=0, process_count=1)
    got = np.asarray(batches.next(7)["input_ids"]).reshape(-1, T)
    np.testing.assert_array_equal(got, loader[9]["input_ids"])
    assert batches.position() == now | {"next_row": 80, "rows": 56}
    batches.close()


def test_rows_of_another_length_go_on_as_far_into_the_text():
    position = {"next_row": 30, "row_tokens": 8, "rows": 30, "batch_sizes": [[1, 0, 3]], "skipped_rows": []}
    assert next_row(position, 16) == 15 and next_row(position, 8) == 30
