"""--overwrite replaces what conversions wrote, and names everything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bc2_jax import manifest
from bc2_jax.convert.conversion import Options, to_gguf, to_hf, to_orbax
from bc2_jax.convert.folder import foreign_in_checkpoint, foreign_in_export, foreign_in_gguf
from bc2_jax.convert.pretrained import save_params
from tests.convert.models import GOLDEN, TINY, random_folder, random_params


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> Path:
    root = tmp_path_factory.mktemp("written")
    save_params(random_params(TINY, np.float32), TINY, root / "saved", Path(tokenizer.path))
    to_orbax(GOLDEN / "rope-tiny", root / "orbax")
    for layout in ("baichuan2", "baichuan1", "llama"):
        for form in ("safetensors", "bin"):
            for size in (5e3, float("inf")):
                to_hf(root / "orbax", root / f"{layout}-{form}-{size}", Options(), "float32", layout, form, size)
    return root


def test_all_that_we_write_is_ours(written):
    for folder in written.iterdir():
        mine, others = foreign_in_export, foreign_in_checkpoint
        if (folder / "params").exists():
            mine, others = others, mine
        assert mine(folder) == [] and others(folder) != []


@pytest.mark.parametrize("entry", ["optimizer.pt", "lora/", "README.md", "adapter_model.safetensors", "config.json.bak",
                                   "model-00001-of-00001.gguf", ".git/", "modeling_baichuan.py", "empty/"])  # fmt: skip
def test_what_lies_beside_an_export_is_named(written, tmp_path, entry):
    folder = tmp_path / "a"
    shutil.copytree(written / "baichuan2-safetensors-inf", folder)
    add(folder / entry)
    assert foreign_in_export(folder) == [entry]
    with pytest.raises(FileExistsError, match=rf"is not replaced, as no conversion wrote {entry}: move it away"):
        to_hf(written / "orbax", folder, Options(overwrite=True))
    assert (folder / entry).exists() and (folder / "model.safetensors").exists()


def add(path: Path) -> None:
    if path.name == "empty":
        path.mkdir()
        return
    file = path if path.suffix or path.name.startswith("params") else path / "file"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"port": 80}', "index.html": "", "src/main.js": ""},
        {"config.json": '{"port": 80}'},
        {"config.json": "{}", "tokenizer.json": "{}", "SHA256SUMS": "not sums"},
        {"thesis.tex": ""},
        {"tokenizer.model": ""},
    ],
    ids=lambda files: "+".join(files),
)
def test_folders_of_others(written, tmp_path, files):
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    for convert in (to_hf, to_orbax):
        with pytest.raises(FileExistsError) as refused:
            convert(written / "orbax", tmp_path / "site", Options(overwrite=True))
        for name in files:
            top, slash, _ = name.partition("/")
            assert top + slash in str(refused.value)
    assert {name: (tmp_path / "site" / name).read_text() for name in files} == files


def test_a_downloaded_release_is_not_ours(tmp_path):
    folder = random_folder(tmp_path / "a")
    (folder / "SHA256SUMS").unlink()
    assert foreign_in_export(folder) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "entry", ["notes.txt", "lora/", "params/notes.txt", "params/norm.weight/backup.bin", "opt_state/"]
)
def test_what_lies_in_a_checkpoint_is_named(written, tmp_path, entry):
    for name in ("orbax", "saved"):
        folder = tmp_path / name
        shutil.copytree(written / name, folder)
        add(folder / entry)
        assert foreign_in_checkpoint(folder) == [entry]
        with pytest.raises(FileExistsError, match=f"no conversion wrote {entry}"):
            to_orbax(GOLDEN / "rope-tiny", folder, Options(overwrite=True))


def test_links_and_training_checkpoints_are_not_ours(written, tmp_path):
    folder = tmp_path / "7"
    shutil.copytree(written / "saved", folder)
    (folder / "opt_state").mkdir()
    (folder / "opt_state" / "_METADATA").touch()
    manifest.write_manifest(folder)
    assert foreign_in_checkpoint(folder) == ["MANIFEST.json", "opt_state/"]
    (folder / "link").symlink_to(written)
    assert "link" in foreign_in_checkpoint(folder)
    export = tmp_path / "export"
    shutil.copytree(written / "llama-bin-inf", export)
    (export / "config.json").rename(tmp_path / "config.json")
    (export / "config.json").symlink_to(tmp_path / "config.json")
    assert foreign_in_export(export) == ["config.json"]


def test_a_file_is_a_gguf_or_not_replaced(written, tmp_path):
    text, gguf = tmp_path / "notes.gguf", tmp_path / "model.gguf"
    text.write_text("a text")
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    assert foreign_in_gguf(text) == ["notes.gguf"] and foreign_in_gguf(gguf) == []
    for target in (text, written):
        with pytest.raises(FileExistsError, match=f"no conversion wrote {target.name}"):
            to_gguf(GOLDEN / "rope-tiny", target, Options(overwrite=True))
    assert text.read_text() == "a text"
