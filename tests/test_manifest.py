"""Manifests: what they list, the damage they find, and that a malicious one cannot point outside."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax import manifest
from bc2_jax.manifest import DamagedCheckpoint

GOOD = [1, "0" * 64]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "7"
    (root / "params" / "d").mkdir(parents=True)
    (root / "params" / "d" / "a").write_bytes(b"abc" * 1000)
    (root / "params" / "b").write_bytes(b"")
    (root / "_METADATA").write_bytes(b"{}")
    manifest.write_manifest(root)
    return root


def write(root: Path, files: object) -> None:
    (root / manifest.MANIFEST_NAME).write_text(json.dumps({"format": 1, "files": files}))


def test_lists_size_and_hash_of_every_file(folder: Path):
    found = manifest.read_manifest(folder)
    assert set(found) == {"params/d/a", "params/b", "_METADATA"}
    for name, state in found.items():
        content = (folder / name).read_bytes()
        assert state == (len(content), hashlib.sha256(content).hexdigest())
    manifest.verify(folder)
    # Writing it again gives the same: the manifest does not list itself.
    assert manifest.write_manifest(folder) == found


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_flipped_bit_is_seen_by_one_of_the_processes(folder: Path, parts: int):
    content = bytearray((folder / "params/d/a").read_bytes())
    content[1234] ^= 4
    (folder / "params/d/a").write_bytes(content)
    manifest.verify(folder, hashes=False)
    manifest.verify(folder, below="_METADATA")
    seen = 0
    for part in range(parts):
        try:
            manifest.verify(folder, part, parts)
        except DamagedCheckpoint as error:
            assert str(error).startswith(f"{folder / 'params/d/a'} is damaged: its SHA-256 is ")
            seen += 1
    assert seen == 1


def test_what_is_missing_cut_off_or_longer_is_named_without_reading(folder: Path):
    target = folder / "params/d/a"
    for change, message in (
        (lambda: target.write_bytes(b"abc" * 999), "has 2997 bytes, 3000 were written"),
        (lambda: target.write_bytes(b"abc" * 1001), "has 3003 bytes"),
        (target.unlink, "a is missing"),
        (target.mkdir, "a is not a file"),
    ):
        change()
        with pytest.raises(DamagedCheckpoint, match=message):
            manifest.verify(folder, hashes=False)


def test_links_are_refused(folder: Path, tmp_path: Path):
    """A link's target may change between verification and reading."""
    target = folder / "params/d/a"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="a is a link"):
        manifest.verify(folder)
    with pytest.raises(ValueError, match="a is a link"):
        manifest.write_manifest(folder)
    target.unlink()
    target.parent.rmdir()
    manifest.refuse_links(folder)
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "d" / "a")
    target.parent.symlink_to(tmp_path / "d")
    with pytest.raises(DamagedCheckpoint, match="d is a link"):
        manifest.verify(folder)
    for function in (manifest.write_manifest, manifest.refuse_links):
        with pytest.raises(DamagedCheckpoint, match="d is a link"):
            function(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "params/../../outside",
        "params//d/a",
        "./a",
        "",
        "a\\..\\b",
        "c:/a",
        "a\n",
        "params/",
    ],
)
def test_names_that_lead_out_are_refused(folder: Path, name: str):
    (folder.parent / "outside").write_bytes(b"x")
    write(folder, {name: GOOD})
    with pytest.raises(DamagedCheckpoint, match="is not the name of a file in the checkpoint"):
        manifest.verify(folder)


@pytest.mark.parametrize(
    "entry", [None, 1, [], [1], [True, "0" * 64], [-1, "0" * 64], [1, "0"], [1, "G" * 64], [1, 2], {}]
)
def test_entries_that_are_none_are_refused(folder: Path, entry: object):
    write(folder, {"_METADATA": entry})
    with pytest.raises(DamagedCheckpoint, match="has no size and SHA-256"):
        manifest.verify(folder)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_other_json_is_refused(tmp_path_factory, value):
    root = tmp_path_factory.mktemp("json")
    (root / manifest.MANIFEST_NAME).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(DamagedCheckpoint):
        manifest.verify(root)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"format": 1, "files": {}}'])
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes):
    (folder / manifest.MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="MANIFEST.json is damaged"):
        manifest.verify(folder)
    (folder / manifest.MANIFEST_NAME).unlink()
    with pytest.raises(DamagedCheckpoint, match="has no MANIFEST.json: it is incomplete or was written by an older"):
        manifest.verify(folder)
