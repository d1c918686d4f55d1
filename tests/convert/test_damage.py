"""Damaged and hostile checkpoints: every reader ends in one sentence, and none reads outside of them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax import manifest
from bc2_jax.convert.conversion import to_hf, to_orbax
from bc2_jax.convert.inspection import diff, inspect
from bc2_jax.convert.pretrained import find_model, load_params, save_params
from bc2_jax.convert.source import open_source
from bc2_jax.manifest import DamagedCheckpoint
from tests.convert.models import TINY, array_bytes, random_folder, random_params

METADATA = ("_CHECKPOINT_METADATA", "params/_METADATA")
READERS = {
    "to-hf": lambda path: to_hf(path, path.with_name("out")),
    "inspect": inspect,
    "diff": lambda path: diff(path, path),
    "load": load_params,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One with an array a folder, as conversions write them, and one with a database, as training does."""
    root = tmp_path_factory.mktemp("checkpoints")
    to_orbax(random_folder(root / "hf"), root / "folders")
    save_params(random_params(TINY, np.float32), TINY, root / "database")
    return {"folders": root / "folders", "database": root / "database"}


def assert_one_sentence(error: BaseException, path: Path) -> None:
    text = str(error)
    assert str(path) in text and "\n" not in text and len(text) < 1000 and text.endswith("."), text


def assert_all_refuse(path: Path, *readers: str) -> None:
    for reader in readers or READERS:
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            READERS[reader](path)
        assert_one_sentence(refused.value, path)
    assert not path.with_name("out").exists()


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"tree_metadata": 3}'],
    ids=lambda content: content[:9].decode("latin1"),
)
def test_metadata_that_is_none(checkpoints, tmp_path, name, content):
    shutil.copytree(checkpoints["folders"], tmp_path / "x")
    (tmp_path / "x" / name).write_bytes(content)
    assert_all_refuse(tmp_path / "x")


def test_missing_files(checkpoints, tmp_path):
    for kind, lost in (
        ("folders", "params/_METADATA"), ("folders", "params/norm.weight/zarr.json"), ("folders", "params/norm.weight"),
        ("folders", "params"), ("folders", "_CHECKPOINT_METADATA"), ("database", "params/manifest.ocdbt"),
        ("database", "params/d"),
    ):  # fmt: skip
        path = tmp_path / kind / lost.replace("/", "-")
        shutil.copytree(checkpoints[kind], path)
        (shutil.rmtree if (path / lost).is_dir() else Path.unlink)(path / lost)
        assert_all_refuse(path)


@pytest.mark.parametrize("shape", [[10**12], [2**62], [17]])
def test_a_chunk_larger_than_its_array(checkpoints, tmp_path, shape):
    """TensorStore would end the process where it cannot make room for it."""
    path = tmp_path / "x"
    shutil.copytree(checkpoints["folders"], path)
    file = path / "params" / "norm.weight" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    file.write_text(json.dumps(metadata))
    assert_all_refuse(path)


places = st.lists(st.integers(0, 20), min_size=1, max_size=6)
values = st.sampled_from([None, [], {}, "", "x", "../x", "%2e%2e%2fx", "/etc", -1, 0, 1e30, True, [[]], {"key": {}}])


def replace(tree: object, place: list[int], value: object) -> None:
    """Puts `value` at a place in a JSON tree: at each level the n-th entry."""
    for depth, number in enumerate(place):
        if not isinstance(tree, dict | list) or not tree:
            return
        key = list(tree)[number % len(tree)] if isinstance(tree, dict) else number % len(tree)
        if depth == len(place) - 1 or not isinstance(tree[key], dict | list) or not tree[key]:
            tree[key] = copy.deepcopy(value)
            return
        tree = tree[key]


@given(st.sampled_from(METADATA), st.lists(st.tuples(places, values), min_size=1, max_size=3))
@settings(max_examples=25)
def test_metadata_with_other_values(checkpoints, tmp_path_factory, name, changes):
    """Either it says the same or it is refused; Orbax has many more ways to end."""
    path = tmp_path_factory.mktemp("other") / "x"
    shutil.copytree(checkpoints["folders"], path)
    metadata = json.loads((path / name).read_text())
    for place, value in changes:
        replace(metadata, place, value)
    (path / name).write_text(json.dumps(metadata))
    try:
        source = open_source(path)
        found = {part: source.read(*part) for part in source.parts()}
    except ValueError as error:
        assert_one_sentence(error, path)
    else:
        assert found.keys() == array_bytes(checkpoints["folders"]).keys()
    try:
        params, config = load_params(path)
    except ValueError as error:
        assert_one_sentence(error, path)
    else:
        assert params["norm"]["weight"].shape == (config.hidden_size,)


@pytest.mark.parametrize("name", ["%2e%2e%2fother", "..", "../other", "/etc", "a\\b", "a|b", "", "x/", ".x", "a..b"])
def test_names_of_arrays_that_could_lead_elsewhere(checkpoints, tmp_path, name):
    path = tmp_path / "x"
    shutil.copytree(checkpoints["folders"], path)
    shutil.copytree(path / "params" / "norm.weight", path / "other")
    metadata = json.loads((path / "params" / "_METADATA").read_text())
    entry = next(iter(metadata["tree_metadata"].values()))
    entry["key_metadata"] = [{"key": name, "key_type": 2}]
    (path / "params" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match="is not the name of an array"):
        open_source(path)
    assert_all_refuse(path)


@pytest.mark.parametrize(
    "place", ["params/norm.weight/c/0", "params/norm.weight", "params", "tokenizer.model", "params/new"]
)
def test_links_out_of_a_checkpoint_are_refused(checkpoints, tmp_path, place):
    """It has no manifest; an export would carry what they lead to."""
    path, secret = tmp_path / "x", tmp_path / "secret"
    shutil.copytree(checkpoints["folders"], path)
    if (path / place).exists():
        (path / place).rename(secret)
    else:
        secret.write_text("secret")
    (path / place).symlink_to(secret)
    with pytest.raises(DamagedCheckpoint, match="is a link"):
        find_model(path)
    assert_all_refuse(path)


def test_a_manifest_of_somebody_else_says_nothing(tmp_path):
    """Browser extensions, npm packages and game data have one too."""
    (tmp_path / "site" / "models").mkdir(parents=True)
    folder = random_folder(tmp_path / "site" / "models" / "a")
    to_orbax(folder, tmp_path / "site" / "models" / "b")
    save_params(random_params(TINY, np.float32), TINY, tmp_path / "site" / "c")
    for place in (tmp_path / "site", tmp_path / "site" / "models", folder):
        (place / manifest.MANIFEST_NAME).write_text('{"manifest_version": 3}')
    for number, source in enumerate((folder, tmp_path / "site" / "models" / "b", tmp_path / "site" / "c")):
        to_orbax(source, tmp_path / f"o{number}")
        to_hf(source, tmp_path / f"h{number}")
        load_params(source)


def test_the_manifest_of_a_checkpoint_is_compared_with_its_arrays(tmp_path):
    save_params(random_params(TINY, np.float32), TINY, tmp_path / "1")
    manifest.write_manifest(tmp_path / "1")
    files = [path for path in (tmp_path / "1" / "params").rglob("*") if path.is_file()]
    assert to_hf(tmp_path / "1", tmp_path / "a").hashed_files == len(files)
    with (tmp_path / "1" / "params" / "_METADATA").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"_METADATA is damaged .* the manifest of its checkpoint says"):
        to_hf(tmp_path / "1", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_many_damaged_chunks_are_one_line(checkpoints, tmp_path):
    """Orbax reads all arrays at once; only the first fault is told, and by us."""
    path = tmp_path / "x"
    shutil.copytree(checkpoints["folders"], path)
    for file in (path / "params").glob("*/c/**/*"):
        if file.is_file():
            content = bytearray(file.read_bytes())
            content[5] ^= 255
            file.write_bytes(content)
    assert_all_refuse(path)
    program = "import sys; from bc2_jax.convert.pretrained import load_params\n"
    program += "try: load_params(sys.argv[1])\nexcept ValueError as error: print(error, file=sys.stderr)\n"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
