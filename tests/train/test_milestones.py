"""The table of a run's checkpoints, and their export as released revisions."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import CheckpointConfig, MeshConfig, ModelConfig
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.metadata import Metadata
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh
from bc2_jax.train.milestones import export, list_milestones, revision_name

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope",
    vocab_size=64,
)  # fmt: skip
KEPT = CheckpointConfig(save_every=10, keep_last=2, keep_every_tokens=1_000_000)
main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "checkpoints.py"))["main"]


def params_of(step: int):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return jax.tree.map(lambda x: x + step, init_params(MODEL, 0, mesh))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """100,000 tokens a step up to step 10, 200,000 from there on; the steps 10 and 20 are permanent."""
    folder = tmp_path / "run"
    checkpointer = Checkpointer(folder / "checkpoints", KEPT)
    config = {
        "model": dataclasses.asdict(MODEL),
        "data": {"global_batch_size": 100, "sequence_length": 1000},
        "checkpoint": dataclasses.asdict(KEPT),
    }
    for step in (5, 10, 15, 20, 25):
        tokens = 100_000 * (step + max(step - 10, 0))
        metadata = Metadata(config, {}, tokens=tokens, permanent=step % 10 == 0)
        checkpointer.save(step, params_of(step), {"count": jnp.int32(0)}, metadata)
    checkpointer.close()
    lines = [{"step": s, "cross_entropy": 5 - s / 10} for s in range(1, 26)]
    lines[9]["validation_cross_entropy"], lines[19]["validation_cross_entropy"] = 4.25, None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_table_says_what_there_is(run: Path, capsys):
    found = [m[:1] + m[2:] for m in list_milestones(run, hashes=True)]
    assert found == [
        (10, 1_000_000, 4.0, 4.25, True, None),
        (20, 3_000_000, 3.0, None, True, None),
        (25, 4_000_000, 2.5, None, False, None),
    ]
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    for part in ("3,000,000", "4.2500", "for ever", "complete"):
        assert part in text
    file = run / "checkpoints" / "20" / "params" / "_METADATA"
    content = file.read_bytes()
    file.write_bytes(b"[" + content[1:])
    assert main([str(run)]) == 0  # the size is right
    assert main([str(run), "--verify"]) == 1
    assert f"{file} is damaged" in capsys.readouterr().out
    file.write_bytes(content[:-1])
    assert main([str(run)]) == 1


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(220_000_000_000, "train_00220B"), (220_003_145_728, "train_00220B"), (2_640_000_000_000, "train_02640B"),
     (1_000_000_000, "train_00001B"), (12_345_678, "train_00012M"), (4096, "train_00004K"), (0, "train_00000K")],
)  # fmt: skip
def test_revisions_are_named_by_tokens(tokens: int, name: str):
    assert revision_name(tokens) == name


def test_exports_what_is_asked_for_in_the_released_layout(run: Path, capsys):
    assert main([str(run), "--export", "all"]) == 0
    released = run / "released"
    assert sorted(p.name for p in released.iterdir()) == ["train_00001M", "train_00003M"]
    weights = [p.name for p in (released / "train_00001M").iterdir() if "model" in p.name and "tokenizer" not in p.name]
    assert weights == ["pytorch_model.bin"]
    params, config = load_params(released / "train_00001M", "float32", None)
    assert config.num_hidden_layers == 2
    for ours, theirs in zip(jax.tree.leaves(params_of(10)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.astype(jnp.bfloat16), np.float32), np.asarray(theirs))
    assert main([str(run), "--export", "10"]) == 1
    assert "train_00001M exists" in capsys.readouterr().err
    assert main([str(run), "--export", "25,10", "--to", str(run / "other")]) == 0
    assert sorted(p.name for p in (run / "other").iterdir()) == ["train_00001M", "train_00004M"]


def test_refuses_before_anything_is_written(run: Path, capsys):
    (run / "checkpoints" / "20" / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="_METADATA is missing"):
        list(export(run, [10, 20], run / "released"))
    with pytest.raises(ValueError, match="step = 11 is not valid: .* has checkpoints of 10, 20, 25"):
        list(export(run, [10, 11], run / "released"))
    assert not (run / "released").exists()
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        list_milestones(run / "checkpoints")
    with pytest.raises(SystemExit):
        main([str(run), "--export", "ten"])
    assert "a step, steps with commas between, or all" in capsys.readouterr().err


def test_one_of_an_older_version_is_taken_as_it_is_when_told(run: Path, capsys):
    folder = run / "checkpoints"
    assert main([str(run), "--seal", "25"]) == 1
    assert "has a MANIFEST.json" in capsys.readouterr().err
    (folder / "25" / "MANIFEST.json").unlink()
    checkpointer = Checkpointer(folder, KEPT)
    assert checkpointer.latest_good() == 20
    assert main([str(run), "--seal", "25"]) == 0
    assert checkpointer.latest_good() == 25
    assert main([str(run), "--seal", "26"]) == 1
    assert find_model(run).path.name == "25"
