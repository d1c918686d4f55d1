"""Checkpoints: restored on any mesh, kept or deleted, refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import CheckpointConfig, ModelConfig
from bc2_jax.convert import pretrained
from bc2_jax.metadata import Metadata, is_permanent
from bc2_jax.model.baichuan import abstract_params, init_params

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
    vocab_size=64,
)  # fmt: skip
METADATA = Metadata({"model": dataclasses.asdict(MODEL)}, {"next_index": 7})


def whole(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 4, 2)])
def test_restores_on_another_mesh(shape, mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(2, 2, 2))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(3, params, {"mu": params}, METADATA)
    checkpointer.wait()
    abstract = abstract_params(MODEL, mesh_of(*shape))
    restored, opt_state = checkpointer.restore(3, abstract, {"mu": abstract})
    for saved, new, moment, target in zip(*map(jax.tree.leaves, (params, restored, opt_state, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(new))
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(moment))
        assert new.sharding == target.sharding
    assert checkpointer.metadata(3) == METADATA == Metadata.from_json(json.loads(json.dumps(METADATA.as_json())), 3)


def test_keeps_the_newest_and_the_permanent(mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(1, 1, 1))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(save_every=10, keep_last=2), pinned=10)
    for step in (10, 20, 30, 40, 50):
        metadata = dataclasses.replace(METADATA, permanent=step % 20 == 0)
        checkpointer.save(step, params, {"count": jnp.int32(0)}, metadata)
    checkpointer.wait()
    assert checkpointer.steps() == [10, 20, 40, 50]
    checkpointer.unpin()
    checkpointer.close()
    assert checkpointer.steps() == [20, 40, 50]
    # What was promised of a checkpoint holds for later starts, whatever they keep for ever themselves.
    later = Checkpointer(tmp_path, CheckpointConfig(keep_last=1))
    later.save(60, params, {"count": jnp.int32(0)}, METADATA)
    later.close()
    assert later.steps() == [20, 40, 60]


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
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    assert checkpointer.steps() == [1] and half.exists()  # it may be that of a live run, until this one owns the place
    checkpointer.remove_leftovers()
    assert not half.exists()
    assert pretrained.find_model(tmp_path).path.name == "1"


def flip(folder):
    """Changes a bit of the largest file."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)
    return file


def saved(directory, mesh, *steps, **config):
    params = init_params(MODEL, 0, mesh)
    checkpointer = Checkpointer(directory, CheckpointConfig(keep_last=9, **config))
    for step in steps:
        shifted = jax.tree.map(functools.partial(jnp.add, step), params)
        checkpointer.save(step, shifted, {"count": jnp.int32(step)}, METADATA)
    checkpointer.wait()
    return checkpointer


def test_the_newest_good_one_is_found_and_the_others_are_named(mesh_of, tmp_path, caplog):
    mesh = mesh_of(1, 1, 1)
    checkpointer = saved(tmp_path, mesh, 1, 2, 3, 4)
    assert checkpointer.latest_good() == 4
    flipped, missing = flip(tmp_path / "4"), tmp_path / "3" / "params" / "_METADATA"
    missing.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert checkpointer.latest_good() == 2
    assert f"{flipped} is damaged: its SHA-256 is" in caplog.text and f"{missing} is missing." in caplog.text
    assert caplog.text.count("the newest good checkpoint is that of step 2.") == 2
    assert sorted(tmp_path.rglob("*")) == before  # looking changes nothing
    checkpointer.set_aside_after(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3.aside", "4.aside"]
    # The same steps are saved again, and damaged again.
    for name in ("3-2.aside", "3-3.aside"):
        checkpointer.save(3, init_params(MODEL, 3, mesh), {"count": jnp.int32(3)}, METADATA)
        checkpointer.wait()
        assert checkpointer.latest_good() == 3
        flip(tmp_path / "3")
        checkpointer.set_aside_after(2)
        assert (tmp_path / name).is_dir()
    checkpointer.close()
    assert Checkpointer(tmp_path, CheckpointConfig()).steps() == [1, 2]  # and the next run leaves them alone
    assert len(list(tmp_path.glob("*.aside"))) == 4


def test_without_a_good_one_nothing_is_moved(mesh_of, tmp_path):
    checkpointer = saved(tmp_path, mesh_of(1, 1, 1), 1, 2)
    (tmp_path / "2" / "MANIFEST.json").unlink()  # as an older version wrote it
    flip(tmp_path / "1")
    with pytest.raises(
        ValueError, match=r"has no good checkpoint: .*/2 has no MANIFEST.json.*/1/.* is damaged.*--seal"
    ):
        checkpointer.latest_good()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert Checkpointer(tmp_path / "new", CheckpointConfig()).latest_good() is None
    assert not (tmp_path / "new").exists()


def test_the_same_step_is_replaced(mesh_of, tmp_path):
    mesh = mesh_of(1, 1, 1)
    checkpointer = saved(tmp_path, mesh, 1)
    new = init_params(MODEL, 5, mesh)
    checkpointer.save(1, new, {"count": jnp.int32(0)}, METADATA)
    checkpointer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    for a, b in zip(whole(new), whole(pretrained.load_params(tmp_path)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_one_is_refused_wherever_parameters_are_read(mesh_of, tmp_path):
    from bc2_jax.convert.conversion import to_hf

    saved(tmp_path, mesh_of(1, 1, 1), 1).close()
    file = flip(tmp_path / "1" / "params")
    with pytest.raises(ValueError, match=f"{file} is damaged: its SHA-256 is"):
        pretrained.load_params(tmp_path)
    with pytest.raises(
        ValueError, match=f"{file} is damaged or not the expected file.*the manifest of its checkpoint says"
    ):
        to_hf(tmp_path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("every", "tokens_per_step", "expected"),
    [(100, 100, range(1, 21)), (250, 100, [3, 5, 8, 10, 13, 15, 18, 20]), (300, 100, range(3, 21, 3)), (2000, 96, [])],
)
def test_permanent_ones_do_not_drift(every, tokens_per_step, expected):
    config = CheckpointConfig(save_every=7, keep_every_tokens=every)
    kept = [s for s in range(21) if is_permanent(config, s, s * tokens_per_step, tokens_per_step)]
    assert kept == list(expected)
    # The definition: the first step at which k * every tokens have been seen.
    assert kept == sorted({-(-k * every // tokens_per_step) for k in range(1, 99)} & set(range(21)))


@pytest.mark.parametrize(
    "config", [None, 3, [], {}, {"model": None}, {"model": {}}, {"model": {"__class__": "os.system"}}]
)  # fmt: skip
def test_metadata_of_something_else_is_one_sentence(mesh_of, tmp_path, config):
    params = init_params(MODEL, 0, mesh_of(1, 1, 1))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(1, params, {"count": jnp.int32(0)}, Metadata(config, {}))
    checkpointer.close()
    with pytest.raises(ValueError, match="is a checkpoint of another program|The model config of .*/1 "):
        pretrained.find_model(tmp_path / "1")


def test_metadata_of_earlier_versions_is_completed():
    """Tokens followed from the step, batches had one size, and what was left out stood with the run's health."""
    sizes = {"global_batch_size": 4, "sequence_length": 16}
    old = {
        "config": {"data": sizes, "checkpoint": {"save_every": 1, "keep_every_tokens": 128}},
        "data": {"next_index": 9},
        "health": {"rewinds": 1, "skipped_batches": [[3, 6]]},
        "row_order": {},
    }
    metadata = Metadata.from_json(old, 6)
    assert metadata.data == {"next_index": 9, "batch_size": 4, "row_tokens": 16, "skipped_batches": [[3, 6]]}
    assert metadata.job == {"row_order": {}} and metadata.tokens == 384 and metadata.permanent
    assert not Metadata.from_json(old, 5).permanent
    assert Metadata.from_json(metadata.as_json(), 6) == metadata


@pytest.mark.parametrize("name", ["../../secret", "a/b", "..", "a\\b"])
def test_array_names_that_lead_out_are_refused(mesh_of, tmp_path, name):
    from bc2_jax.convert.orbax import open_arrays

    saved(tmp_path, mesh_of(1, 1, 1), 1).close()
    file = tmp_path / "1" / "params" / "_METADATA"
    tree = json.loads(file.read_text())
    next(iter(tree["tree_metadata"].values()))["key_metadata"][0]["key"] = name
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="is not the name of an array"):
        open_arrays(tmp_path / "1")


def test_params_only_round_trip(mesh_of, tmp_path):
    params = init_params(MODEL, 0, mesh_of(1, 4, 2))
    path = tmp_path / "model"
    pretrained.save_params(params, MODEL, path)
    loaded, config = pretrained.load_params(path)
    assert config == MODEL
    for a, b in zip(whole(params), whole(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(FileExistsError, match="exists"):
        pretrained.save_params(params, MODEL, path)
