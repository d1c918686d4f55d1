"""Checkpoints: any mesh to any mesh, what is kept, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax import checkpoint
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import CheckpointConfig, ModelConfig
from bc2_jax.model.baichuan import init_params

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
    vocab_size=64,
)  # fmt: skip
METADATA = {"config": {"model": dataclasses.asdict(MODEL)}, "data": {"next_index": 7}}


def whole(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 4, 2)])
def test_restores_on_another_mesh(shape, mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(2, 2, 2))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(3, params, {"mu": params}, METADATA)
    checkpointer.wait()
    abstract = checkpoint.abstract_params(MODEL, mesh_of(*shape))
    restored, opt_state = checkpointer.restore(3, abstract, {"mu": abstract})
    for saved, new, moment, target in zip(*map(jax.tree.leaves, (params, restored, opt_state, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(new))
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(moment))
        assert new.sharding == target.sharding
    assert checkpointer.metadata(3) == json.loads(json.dumps(METADATA))


def test_keeps_the_newest_and_the_permanent(mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(1, 1, 1))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(save_every=10, keep_last=2, keep_every=20))
    for step in (10, 20, 30, 40, 50):
        checkpointer.save(step, params, {"count": jnp.int32(0)}, METADATA)
    checkpointer.wait()
    checkpointer.close()
    assert Checkpointer(tmp_path, CheckpointConfig()).steps() == [20, 40, 50]


def test_a_half_written_checkpoint_does_not_count(mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(1, 1, 1))
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        checkpointer.save(step, params, {"count": jnp.int32(0)}, METADATA)
    checkpointer.wait()
    checkpointer.close()
    # What a kill during the save of step 2 leaves: the folder without the marks of completion.
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
        (tmp_path / "checkpoints" / "2" / name).unlink(missing_ok=True)
    half = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert Checkpointer(tmp_path / "checkpoints", CheckpointConfig()).steps() == [1]
    assert not half.exists()
    assert checkpoint.find_checkpoint(tmp_path).name == "1"


def test_params_only_round_trip(mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(1, 4, 2))
    path = tmp_path / "model"
    checkpoint.save_params(params, MODEL, path)
    loaded, config = checkpoint.load_params(path)
    assert config == MODEL
    for a, b in zip(whole(params), whole(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(FileExistsError, match="exists"):
        checkpoint.save_params(params, MODEL, path)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint and holds none"):
        checkpoint.find_checkpoint(tmp_path)
