"""The scoring program: log-probabilities of given tokens at given places, as from the logits of all tokens."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.infer.score import Rows, empty_rows, make_program, score_rows
from bc2_jax.model.baichuan import Baichuan2, param_shardings, split_model
from tests.convert.models import read_params

GOLDEN = Path(__file__).parents[1] / "golden"
# The chunk cuts the places of a row.
COMPUTE = ComputeConfig(dtype="float32", attention_block=16, remat="none", loss_chunk=10)


def load(name: str, mesh=None) -> Baichuan2:
    config = read_config(GOLDEN / name)
    params = jax.device_put(read_params(GOLDEN / name, config), None if mesh is None else param_shardings(config, mesh))
    return nnx.merge(split_model(config, COMPUTE)[0], params)


def make_rows(vocab_size: int) -> Rows:
    """A trunk of 9 with branches of 6 and 11 in each row, and a document of 5; three places, one of them twice."""
    rng = np.random.default_rng(0)
    rows = empty_rows(4, 32, 4)
    rows.ids_BT[:] = rng.integers(3, vocab_size, (4, 32))
    rows.segments_BT[:, :31] = np.repeat([1, 1 + (1 << 24), 1 + (2 << 24), 2], [9, 6, 11, 5])
    rows.places_BS[:] = [14, 25, 25, 0]
    rows.labels_BS[:, :3] = rng.integers(3, vocab_size, (4, 3))
    return rows


@pytest.mark.parametrize(("name", "shape"), [("rope-tiny", (1, 2, 1, 1, 2)), ("alibi-tiny", (2, 1, 2))])
def test_scores_are_those_of_the_logits_of_trunk_and_branch_alone(name, shape, mesh_of):
    model = load(name)
    rows = make_rows(model.config.vocab_size)
    alone = [np.r_[0:15], np.r_[0:9, 15:26]]
    ids = np.zeros((8, 20), np.int32)
    for row in range(4):
        for n, columns in enumerate(alone):
            ids[2 * row + n, : len(columns)] = rows.ids_BT[row, columns]
    logits = np.array(jax.jit(model)(ids), np.float64)
    last = np.stack([logits[0::2, 14], logits[1::2, 19], logits[1::2, 19]], axis=1)
    rows.labels_BS[2, 2] = last[2, 2].argmax()
    label = np.take_along_axis(last, rows.labels_BS[:, :3, None], axis=-1)[..., 0]
    expected = label - np.log(np.exp(last).sum(-1))
    found = score_rows(model, rows)
    np.testing.assert_allclose(found.log_prob[:, :3], expected, atol=1e-5)
    np.testing.assert_array_equal(found.is_argmax[:, :3], last.argmax(-1) == rows.labels_BS[:, :3])
    assert found.is_argmax[2, 2]
    np.put_along_axis(last, rows.labels_BS[:, :3, None], -np.inf, axis=-1)
    np.testing.assert_allclose(found.margin[:, :3], label - last.max(-1), atol=1e-5)
    for x in found:
        assert not np.asarray(x[:, 3]).any()  # of an ignored label nothing is said
    on_mesh = score_rows(load(name, mesh_of(*shape)), rows)
    assert all(x.sharding.is_fully_replicated for x in on_mesh)
    for a, b in zip(on_mesh, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_other_parameters_compile_nothing():
    model, rows = load("rope-tiny"), make_rows(100)
    first = score_rows(model, rows)
    compiled = make_program()._cache_size()
    other = nnx.merge(nnx.split(load("rope-tiny"))[0], jax.tree.map(lambda x: 0.5 * x, nnx.split(model)[1]))
    assert not np.array_equal(score_rows(other, rows).log_prob, first.log_prob)
    assert make_program()._cache_size() == compiled


def test_shapes_that_the_mesh_does_not_cut_are_refused(mesh_of):
    model = load("rope-tiny", mesh_of(2, 1, 2))
    with pytest.raises(ValueError, match="3 rows .* multiple of 2"):
        score_rows(model, empty_rows(3, 16, 4))
