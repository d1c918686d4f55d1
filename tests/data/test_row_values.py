"""Values of rows are found whatever the order of the rows, and never another row's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, MeshConfig, SourceConfig
from bc2_jax.data.row_batches import RowBatches, ValidationBatches
from bc2_jax.data.row_file import BadRows
from bc2_jax.data.row_values import DIGESTED, RowValues, digest_rows
from bc2_jax.sharding import DEFAULT_RULES, make_mesh
from tests.packed_rows import pack_texts

T = 16


def make_rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(1, 900, (count, T), np.int32) for name in (*DIGESTED, "positions")}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.permutations(range(9)), st.sampled_from(DIGESTED), st.integers(0, T - 1))
def test_a_row_has_its_own_values(count, order, name, place):
    rows, values = make_rows(count), np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)
    kept = RowValues(digest_rows(rows), values)
    order = [i for i in order if i < count]
    shuffled = {field: x[order] for field, x in rows.items()}
    np.testing.assert_array_equal(kept.lookup(shuffled), values[order])
    other = {field: x.copy() for field, x in rows.items()}
    other[name][0, place] += 1
    with pytest.raises(ValueError, match=f"1 of {count} rows are not among the {count} with stored values"):
        kept.lookup(other)
    padding = {field: np.zeros_like(x) for field, x in rows.items()}
    np.testing.assert_array_equal(kept.lookup(padding), np.zeros((count, 3), np.float32))


def test_digests_are_the_same_on_every_machine():
    """The numbers are those of the first version: files that are kept hold them."""
    rows = {name: np.arange(8, dtype=np.int32).reshape(2, 4) + i for i, name in enumerate(DIGESTED)}
    assert [f"{digest:016x}" for digest in digest_rows(rows)] == ["1176f4177385836e", "2cfb4bd1dd18137c"]


def test_a_file_is_whole_or_refused(tmp_path):
    rows, path = make_rows(5), tmp_path / "kept" / "values.npz"
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    RowValues(digest_rows(rows), values, {"key": "数"}).save(path)
    found = RowValues.load(path)
    assert (len(found), found.width, found.about) == (5, 2, {"key": "数"})
    np.testing.assert_array_equal(found.lookup(rows), values)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-7], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"values\.npz holds no values of rows, or is damaged"):
            RowValues.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="holds no values of rows"):
        RowValues.load(path)
    with pytest.raises(FileNotFoundError):
        RowValues.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"values have shape \(5,\)"):
        RowValues(digest_rows(rows), values[:, 0])


def test_batches_have_the_values_of_their_rows(tokenizer, modules, tmp_path):
    documents = [part for part in modules[0].split("\n\n") if part]
    pack_texts(documents, tokenizer, tmp_path / "rows", T, validation_fraction=0.1)
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "rows")),), tokenizer=str(tokenizer.path), sequence_length=T,
        global_batch_size=16, accumulation_steps=2,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=2, context=4))

    def fields(rows):
        total = rows["input_ids"].sum(-1, dtype=np.float32)
        return {"total": np.stack([total, -total, 0 * total], -1)}

    training = RowBatches(data, mesh, 0, BadRows(0), fields=fields)
    for batch in (training.next(1), ValidationBatches(data, mesh, BadRows(0), fields)[0]):
        total = np.asarray(batch["input_ids"]).sum(-1)
        np.testing.assert_array_equal(batch["total"], np.stack([total, -total, 0 * total], -1))
        assert batch["total"].sharding.spec == DEFAULT_RULES.spec(None, "batch", None)
    with np.load(training.save(1, tmp_path, {})) as saved:
        assert saved["total"].shape == (16, 3)
    training.close()
