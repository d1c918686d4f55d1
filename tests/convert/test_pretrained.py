"""Finding a model: every kind of path that means one, and one sentence for every kind that does not."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import bc2_jax
from bc2_jax.config import DataConfig, SourceConfig, TrainConfig
from bc2_jax.convert.conversion import Options, to_hf
from bc2_jax.convert.pretrained import find_model, load_params, save_params
from tests.convert.models import GOLDEN, TINY, random_folder, random_params


def make_run(folder: Path, *steps: int) -> Path:
    """What a training run leaves: its config.json, its tokenizer and the parameters of checkpoints, by their seed."""
    (folder / "checkpoints").mkdir(parents=True)
    data = DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model")
    config = dataclasses.asdict(TrainConfig(name="run", num_steps=20, model=TINY, data=data))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    for step in steps:
        save_params(random_params(TINY, np.float32, step), TINY, folder / "checkpoints" / str(step))
    return folder


def cut_short(checkpoint: Path) -> None:
    """What a kill during a save leaves."""
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("found") / "run", 9, 10, 11)
    cut_short(folder / "checkpoints" / "11")
    return folder


@pytest.mark.parametrize(
    ("path", "step"), [("", 10), ("checkpoints", 10), ("checkpoints/9", 9), ("checkpoints/../checkpoints/10", 10)]
)
def test_a_run_its_checkpoints_and_each_of_them(run, path, step):
    found = find_model(run / path)
    assert (found.path.name, found.format, found.config) == (str(step), "orbax", TINY)
    assert found.tokenizer is not None and found.tokenizer.samefile(run / "tokenizer.model")
    assert bc2_jax.find_tokenizer(run / path).samefile(run / "tokenizer.model")
    params, config = load_params(run / path)
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, params, random_params(TINY, np.float32, step))


def test_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run)
    assert find_model(".").path == run / "checkpoints" / "10"
    monkeypatch.chdir(run / "checkpoints" / "9")
    assert find_model(".").path == run / "checkpoints" / "9"
    assert bc2_jax.find_tokenizer(".") == run / "tokenizer.model"


def test_a_pytorch_folder(tmp_path):
    folder = random_folder(tmp_path / "a", seed=3)
    (tmp_path / "tokenizer.model").write_bytes(b"of another model")
    found = find_model(folder)
    assert (found.path, found.format, found.config, found.tokenizer) == (folder, "pytorch", TINY, None)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    assert find_model(folder).tokenizer == bc2_jax.find_tokenizer(folder) == folder / "tokenizer.model"
    jax.tree.map(np.testing.assert_array_equal, load_params(folder)[0], random_params(TINY, np.float32, 3))


@pytest.mark.parametrize("load", [find_model, bc2_jax.load_pretrained, load_params])
def test_where_no_model_is_one_sentence_says_why(tmp_path, load):
    def refused(path: Path, reason: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'{path} {reason}')}$"):
            load(path)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a model: it has no config.json and is neither a bc2_jax run nor a checkpoint.")
    refused(tmp_path / "nothing", "does not exist.")
    file = GOLDEN / "rope-tiny" / "config.json"
    refused(file, "is a file: give the folder of a model, of a checkpoint or of a run.")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    lora = tmp_path / "lora"
    refused(lora, "has neither adapter_model.safetensors nor adapter_model.bin.")
    (lora / "adapter_model.safetensors").touch()
    refused(lora, "is a LoRA adapter, which needs the model it was made of: merge the two with `python "
            f"tools/convert.py merge-lora BASE {lora} OUT`, or load them together with load_pretrained('BASE', "
            f"adapter={str(lora)!r}).",
    )  # fmt: skip
    run = make_run(tmp_path / "run", 7)
    cut_short(run / "checkpoints" / "7")
    refused(run / "checkpoints" / "7", "is a checkpoint that is not complete: it was not written to its end, or files "
            "were removed.")  # fmt: skip
    for path in (run, run / "checkpoints"):
        refused(path, "has no checkpoint: its run has not completed one yet.")
    shutil.rmtree(run / "checkpoints")  # a run makes it when it saves for the first time
    refused(run, "has no checkpoint: its run has not completed one yet.")


def test_a_run_that_has_not_saved_yet_has_its_tokenizer_and_is_not_overwritten(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoints").rmdir()
    assert bc2_jax.find_tokenizer(run) == run / "tokenizer.model"
    with pytest.raises(FileExistsError, match=r"no conversion wrote config\.json; tokenizer\.model:"):
        to_hf(GOLDEN / "rope-tiny", run, Options(overwrite=True))
    assert (run / "tokenizer.model").read_bytes() == b"pieces"


def test_a_tokenizer_above_is_that_of_another_model(tmp_path):
    """Only RUN/checkpoints and RUN/checkpoints/STEP have theirs above them."""
    random_folder(tmp_path / "hf")
    save_params(random_params(TINY, np.float32), TINY, tmp_path / "7")
    (tmp_path / "tokenizer.model").write_bytes(b"of another model")
    for model in ("hf", "7"):
        with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.model, nor has its run"):
            bc2_jax.find_tokenizer(tmp_path / model)
        assert find_model(tmp_path / model).tokenizer is None


def test_config_json_alone_does_not_say_what_a_folder_is(tmp_path):
    folder = random_folder(tmp_path / "hf")
    (folder / "checkpoints").mkdir()
    assert find_model(folder).format == "pytorch"
    save_params(random_params(TINY, np.float32), TINY, tmp_path / "7")
    shutil.copy(folder / "config.json", tmp_path / "7")
    assert find_model(tmp_path / "7").format == "orbax"
    for config in ("", "{", "[]", "{}"):  # of a run that was killed while it wrote it
        run = make_run(tmp_path / f"run{len(config)}{config == '[]'}", 3)
        (run / "config.json").write_text(config)
        assert find_model(run).path.name == "3"


def test_only_ascii_digits_name_a_step(tmp_path):
    run = make_run(tmp_path / "run", 3)
    for name in ("²", "٣٣", "4.aside", "-5"):
        shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / name)
    assert find_model(run).path.name == "3"


def test_without_a_tokenizer(tmp_path):
    for path, reason in ((tmp_path, "has no tokenizer.model, nor has its run"), (tmp_path / "a", "does not exist")):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'{path} {reason}.')}$"):
            bc2_jax.find_tokenizer(path)
