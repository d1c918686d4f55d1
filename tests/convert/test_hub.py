"""Models by their id, against a hub on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from bc2_jax.convert import hub
from bc2_jax.convert.hub import local_model
from bc2_jax.convert.pretrained import find_model, find_tokenizer
from tests.convert.fake_hub import COMMIT, FakeHub

ROOT = Path(__file__).parents[2]
MODEL = "owner/tiny"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    server.models[MODEL] = tiny_model
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    hub._fetch.cache_clear()
    yield server
    server.close()
    hub._fetch.cache_clear()


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A model as on the hub: weights in both formats, code, a large file that nothing needs."""
    folder = shutil.copytree(ROOT / "tests" / "golden" / "rope-tiny", tmp_path / "on the hub")
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('code was run')\n")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    (folder / "optimizer.bin").write_bytes(b"not needed")
    return folder


def again() -> Path:
    hub._fetch.cache_clear()
    return local_model(MODEL)


def test_an_id_is_a_model(fake, capsys):
    found = find_model(MODEL)
    assert found.path.name == COMMIT and found.config == find_model(fake.models[MODEL]).config
    names = {path.name for path in found.path.iterdir()}
    assert "config.json" in names and any(name.endswith(".safetensors") for name in names)
    assert not {name for name in names if name.endswith((".py", ".bin"))}
    said = capsys.readouterr().err
    assert "owner/tiny: licence baichuan2-community" in said and "GB, revision aaaaaaaaaaaa" in said
    count = len(fake.requests)
    assert find_model(MODEL).path == found.path and len(fake.requests) == count  # one answer for a process
    again()
    assert not [path for method, path, _ in fake.requests[count:] if method == "GET" and not path.startswith("api/")]
    assert "downloading" not in capsys.readouterr().err


def test_bin_files_are_taken_where_there_are_no_others(fake):
    for path in fake.models[MODEL].glob("model*"):
        path.unlink()
    assert (local_model(MODEL) / "pytorch_model.bin").read_bytes() == b"not needed"


def test_a_revision(fake):
    assert local_model(f"{MODEL}@v2").name == COMMIT
    with pytest.raises(FileNotFoundError, match=r"does not exist here, and .* has no revision 'v9'\.$"):
        local_model(f"{MODEL}@v9")


def test_local_paths_go_first(fake, tmp_path):
    (tmp_path / "owner").mkdir()
    assert local_model("owner/absent") == Path("owner/absent")  # a typo in a local path, not an id
    (tmp_path / "owner" / "tiny").mkdir()
    assert local_model(MODEL) == Path(MODEL)
    assert local_model(tmp_path / "none" / "such") == tmp_path / "none" / "such"
    assert fake.requests == []
    with pytest.raises(FileNotFoundError, match=r"^owner/absent does not exist\.$"):
        find_model("owner/absent")


def test_models_that_cannot_be_had(fake):
    fake.gated.add("owner/gated")
    with pytest.raises(FileNotFoundError, match=r"^owner/none does not exist here, and the hub has no public model"):
        find_tokenizer("owner/none")
    with pytest.raises(ValueError, match=r"owners ask for consent first: agree on .*/owner/gated, then log in"):
        find_model("owner/gated")
    for path in fake.models[MODEL].iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(ValueError, match=r"has neither model\*\.safetensors nor pytorch_model\*\.bin on the hub"):
        find_model(MODEL)


def test_a_connection_that_breaks_resumes_within_a_file(fake, monkeypatch):
    large = max(fake.models[MODEL].glob("model*.safetensors"), key=lambda path: path.stat().st_size)
    fake.broken[large.name] = 1
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    assert (local_model(MODEL) / large.name).read_bytes() == large.read_bytes()
    ranges = [span for method, path, span in fake.requests if method == "GET" and path.endswith(large.name)]
    assert len(ranges) == 2 and ranges[0] is None and int(ranges[1].split("=")[1].rstrip("-")) > 0


def test_an_interrupted_download_resumes(fake):
    large = max(fake.models[MODEL].glob("model*.safetensors"), key=lambda path: path.stat().st_size)
    fake.broken[large.name] = 100
    with pytest.raises(ValueError, match="could not be downloaded .* the same command again resumes"):
        local_model(MODEL)
    fake.broken, count = {}, len(fake.requests)
    find_model(again())
    fetched = [path for method, path, _ in fake.requests[count:] if method == "GET" and "/resolve/" in path]
    assert [path.rsplit("/")[-1] for path in fetched] == [large.name]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_tampered_file_is_refused(fake, name):
    fake.tampered.add(name)
    with pytest.raises(ValueError, match=f"{name} of owner/tiny was not taken: its checksum"):
        local_model(MODEL)
    with pytest.raises(ValueError, match="was not taken"):  # it did not stay in the cache
        again()
    fake.tampered.clear()
    assert find_model(again()).config


def test_without_a_connection_the_cache_is_taken(fake, monkeypatch):
    found = local_model(MODEL)
    fake.close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert again() == found
    with pytest.raises(FileNotFoundError, match=r"owner/other does not exist here, and the hub cannot be asked"):
        local_model("owner/other")


def test_a_card_without_a_licence(fake, capsys):
    fake.card = {}
    local_model(MODEL)
    assert f"licence not stated (see {fake.url}/owner/tiny)" in capsys.readouterr().err


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._fetch.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"it needs pip install 'bc2_jax\[hub\]'\.$"):
        local_model("owner/not-here")


def test_programs_take_an_id(fake, tmp_path):
    """As typed, with the hub's own variables."""
    environment = {
        **os.environ, "HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "bc2_jax", "convert", "inspect", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "licence baichuan2-community" in done.stderr and "parameters" in done.stdout
