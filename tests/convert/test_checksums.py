from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.convert import checksums
from bc2_jax.convert.checksums import expected_sha256, verify_file, write_sha256sums
from bc2_jax.convert.pickled import read_entries, read_pickled
from bc2_jax.convert.pickled_write import write_pickled
from bc2_jax.convert.safetensors import write_safetensors
from bc2_jax.files import file_sha256

GOLDEN = Path(__file__).parents[1] / "golden" / "rope-tiny"
ARRAYS = {f"w{i}": np.arange(5 * i, 5 * i + 20).reshape(4, 5).astype(ml_dtypes.bfloat16) for i in range(3)}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def by_sums(file: Path, digest: str) -> None:
    (file.parent / "SHA256SUMS").write_text(f"# ours\n{'0' * 64}  other.bin\n\n{digest}  {file.name}\n")


def by_binary_sums(file: Path, digest: str) -> None:
    (file.parent / "SHA256SUMS").write_bytes(f"{digest.upper()} *./{file.name}\r\n\\{'0' * 64}  a\\nb\n".encode())


def by_blob(file: Path, digest: str) -> None:
    blob = file.parent / "blobs" / digest
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(Path("blobs") / digest)


def by_metadata(file: Path, digest: str) -> None:
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{'a' * 40}\n{digest}\n1733000000.5\n")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize("say", [by_sums, by_binary_sums, by_blob, by_metadata])
def test_each_source_of_hashes(file, say):
    assert expected_sha256(file)[0] is None and verify_file(file) is False
    say(file, sha256(b"weights"))
    assert expected_sha256(file)[0] == sha256(b"weights") and verify_file(file) is True
    file.write_bytes(b"weighty")
    with pytest.raises(ValueError) as error:
        verify_file(file)
    message = str(error.value)
    assert str(file) in message and sha256(b"weights") in message and sha256(b"weighty") in message
    assert message.endswith(".") and ". " not in message and "\n" not in message


def test_a_chain_of_links_to_a_blob(file, tmp_path):
    by_blob(file, sha256(b"weights"))
    link = tmp_path / "elsewhere" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(file)
    assert expected_sha256(link)[0] == sha256(b"weights")


def test_names_that_are_no_sha256_say_nothing(file):
    by_blob(file, "b" * 40)
    by_metadata(file, "c" * 40)
    assert expected_sha256(file)[0] is None
    (file.parent / ".cache/huggingface/download" / f"{file.name}.metadata").write_text("")
    assert expected_sha256(file)[0] is None


def test_sources_that_agree_and_disagree(file):
    digest = sha256(b"weights")
    by_sums(file, digest)
    by_blob(file, digest)
    by_metadata(file, digest)
    assert expected_sha256(file)[0] == digest
    by_sums(file, "1" * 64)
    for function in (expected_sha256, verify_file):
        with pytest.raises(
            ValueError, match=r"contradicting SHA-256: 1{64} by .*SHA256SUMS; .*blobs.*; .*\.metadata\."
        ):
            function(file)


def test_one_file_twice_in_sha256sums(file):
    sums = file.parent / "SHA256SUMS"
    sums.write_text(f"{'1' * 64}  {file.name}\n{'2' * 64}  {file.name}\n")
    with pytest.raises(ValueError, match="contradicting SHA-256"):
        expected_sha256(file)


@pytest.mark.parametrize(
    "line", ["hello", "1" * 63 + "  x.bin", "1" * 64 + " x.bin", "1" * 64, "g" * 64 + "  x.bin", " "]
)
def test_malformed_sha256sums(file, line):
    (file.parent / "SHA256SUMS").write_text(f"{'1' * 64}  x.bin\n{line}\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS: line 2 is not a SHA-256 and a file name: '.*'\."):
        expected_sha256(file)


def test_sha256sum_accepts_what_we_write(tmp_path):
    folder = tmp_path / "out put"
    folder.mkdir()
    names = ["b.bin", "a b.safetensors", "config.json", "层.model"]
    for name in names:
        (folder / name).write_bytes(name.encode() * 1000)
    write_sha256sums(folder, {name: file_sha256(folder / name) for name in names})
    environment = {**os.environ, "LC_ALL": "C"}
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(command, cwd=folder, capture_output=True, env=environment)
    assert (result.returncode, result.stderr, result.stdout.count(b": OK\n")) == (0, b"", len(names))
    ours = (folder / "SHA256SUMS").read_bytes()
    made = subprocess.run(["sha256sum", *sorted(names)], cwd=folder, capture_output=True, env=environment)
    assert ours == made.stdout
    assert all(verify_file(folder / name) for name in names)


@pytest.mark.parametrize(
    ("name", "digest", "message"),
    [
        ("a.bin", "F" * 64, "is not a SHA-256"),
        ("a.bin", "1" * 40, "is not a SHA-256"),
        ("../a.bin", "1" * 64, "is not the name of a file"),
        ("a\nb", "1" * 64, "is not the name of a file"),
        ("a\\b", "1" * 64, "is not the name of a file"),
        ("..", "1" * 64, "is not the name of a file"),
        ("", "1" * 64, "is not the name of a file"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, digest, message):
    with pytest.raises(ValueError, match=message):
        write_sha256sums(tmp_path, {name: digest})
    assert not (tmp_path / "SHA256SUMS").exists()


@pytest.mark.parametrize("block", [1000, 8 << 20])
def test_a_bin_as_torch_wrote_it_is_right(monkeypatch, block):
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", block)
    files = sorted(GOLDEN.glob("*.bin"))
    assert files and all(verify_file(file) for file in files)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_pickled(folder / "x.bin", ml_dtypes.bfloat16, SHAPES, ARRAYS.items())
    write_safetensors(folder / "x.safetensors", ml_dtypes.bfloat16, SHAPES, ARRAYS.items())
    return folder


def damage(originals: Path, folder: Path, name: str, place: float, flip: int) -> Path:
    data = bytearray((originals / name).read_bytes())
    data[int(place * len(data))] ^= flip
    (folder / name).write_bytes(data)
    return folder / name


PLACE, FLIP = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


@given(st.sampled_from(["x.bin", "x.safetensors"]), PLACE, FLIP)
@settings(max_examples=200)
def test_any_damaged_byte_is_found_with_sha256sums(originals, tmp_path_factory, name, place, flip):
    folder = tmp_path_factory.mktemp("damaged")
    write_sha256sums(folder, {name: file_sha256(originals / name)})
    file = damage(originals, folder, name, place, flip)
    with pytest.raises(ValueError, match="is damaged or not the expected file"):
        verify_file(file)
    shutil.copy(originals / name, file)
    assert verify_file(file)


@given(PLACE, FLIP)
@settings(max_examples=400)
def test_no_damaged_byte_of_a_bin_changes_a_tensor_unnoticed(originals, tmp_path_factory, place, flip):
    file = damage(originals, tmp_path_factory.mktemp("damaged"), "x.bin", place, flip)
    try:
        assert verify_file(file) is True
        tensors = read_pickled(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert list(tensors) == list(ARRAYS)
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.read().tobytes()) == (ARRAYS[name].dtype, ARRAYS[name].tobytes())


@given(st.sampled_from(["data.pkl", "data/0", "data/1", "data/2"]), PLACE, FLIP)
@settings(max_examples=200)
def test_any_damaged_byte_of_an_entry_is_found(originals, tmp_path_factory, name, place, flip):
    entry = read_entries(originals / "x.bin")[name]
    at = entry.offset + int(place * entry.size)
    size = (originals / "x.bin").stat().st_size
    file = damage(originals, tmp_path_factory.mktemp("damaged"), "x.bin", (at + 0.5) / size, flip)
    with pytest.raises(ValueError, match=rf"x\.bin is damaged: the CRC-32 of its storage 'archive/{name}' is .*\."):
        verify_file(file)


def test_a_bin_without_checksums_has_nothing_to_check(originals, tmp_path):
    """As torch writes it after set_crc32_options(False): 0 for every checksum."""
    data = bytearray((originals / "x.bin").read_bytes())
    with zipfile.ZipFile(originals / "x.bin") as archive:
        at = archive.start_dir
    while (at := data.find(b"PK\1\2", at)) >= 0:
        data[at + 16 : at + 20] = bytes(4)
        at += 4
    file = tmp_path / "x.bin"
    file.write_bytes(data)
    assert verify_file(file) is False
    assert {name: tensor.read().tobytes() for name, tensor in read_pickled(file).items()} == {
        name: array.tobytes() for name, array in ARRAYS.items()
    }
    write_sha256sums(tmp_path, {"x.bin": file_sha256(file)})
    assert verify_file(file) is True


def test_a_truncated_bin(originals, tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes((originals / "x.bin").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"x\.bin is truncated"):
        verify_file(file)
