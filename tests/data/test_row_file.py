"""Files of packed rows under damage: a row comes back as it was packed, or is named as one that can't be read."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bc2_jax.data import packing
from bc2_jax.data.packing import check_files, iterate_rows, load_manifest, read_rows
from bc2_jax.data.row_file import BadRow, FileInfo, RowFile, RowFileWriter
from bc2_jax.data.row_stream import find_sources, read_document
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

T, ROWS = 8, 7


def write(path: Path, seed: int) -> tuple[FileInfo, list[bytes]]:
    """A file of random rows of 8 + 1 tokens."""
    rows = np.random.default_rng(seed).integers(3, 640, (ROWS, T + 1), np.uint32)
    writer = RowFileWriter(path)
    for row in rows:
        writer.write(row)
    assert writer.rows == ROWS
    return FileInfo(path.name, ROWS, path.stat().st_size, "", writer.close()), [row.tobytes() for row in rows]


with tempfile.TemporaryDirectory() as folder:
    INFO, RECORDS = write(Path(folder, "rows"), 0)
    _, OTHER_RECORDS = write(Path(folder, "other"), 1)
    CONTENT, OTHER = Path(folder, "rows").read_bytes(), Path(folder, "other").read_bytes()
USED = [i for i in range(len(CONTENT)) if any(CONTENT[max(i - 16, 0) : i + 16])]
"""All but the long stretches of zeros to which ArrayRecord fills a file up."""

places = st.sampled_from(USED) | st.integers(0, len(CONTENT) - 1)
lengths = st.integers(1, 64) | st.integers(1, len(CONTENT))


@st.composite
def damaged_contents(draw: st.DrawFn) -> bytes:
    """A bit, a stretch of zeros or of another such file, a file that is cut off, longer, or another one."""
    content = bytearray(CONTENT)
    kind, place, length = draw(st.sampled_from(["bit", "zeros", "other", "cut", "longer"])), draw(places), draw(lengths)
    if kind == "bit":
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "zeros":
        content[place : place + length] = bytes(len(content[place : place + length]))
    elif kind == "other":
        content[place : place + length] = OTHER[place : place + length]
    elif kind == "cut":
        del content[place:]
    else:
        content += content[:length]
    return bytes(content)


@given(damaged_contents(), st.booleans())
@example(OTHER, True)
@example(OTHER, False)
@example(b"", True)
@example(b"", False)
@settings(max_examples=300)
def test_damage_is_named_or_does_no_harm(content: bytes, is_open: bool) -> None:
    """Before the file is opened, or under the hands of who reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, INFO.name)
        path.write_bytes(CONTENT)
        with RowFile(folder, INFO, T) as file:
            if is_open:
                assert file.read(0) == RECORDS[0]
            with path.open("r+b") as damaged:
                damaged.write(content)
                damaged.truncate()
            for row, record in [*enumerate(RECORDS), (0, RECORDS[0])]:
                try:
                    assert file.read(row) == record
                except BadRow as bad:
                    assert (bad.path, bad.row) == (path, row)
                    expected = (
                        rf"row {row} of '{re.escape(str(path))}' can't be read \(.+\): the file is damaged, was .*"
                    )
                    assert re.fullmatch(expected, str(bad)), bad
                    assert content != CONTENT
            try:
                assert file.read_range(1, ROWS) == RECORDS[1:]
            except BadRow as bad:
                with pytest.raises(BadRow, match=re.escape(str(bad))):
                    file.read(bad.row)


def test_every_bit_of_the_rows_counts(tmp_path: Path) -> None:
    path = tmp_path / INFO.name
    for row, bit in itertools.product(range(ROWS), range(0, 32 * (T + 1), 31)):
        content = bytearray(CONTENT)
        content[CONTENT.index(RECORDS[row]) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with RowFile(tmp_path, INFO, T) as file:
            for other in range(ROWS):
                if other == row:
                    with pytest.raises(BadRow, match=f"row {row} of .* can't be read"):
                        file.read(row)
                else:
                    assert file.read(other) == RECORDS[other]


def test_a_row_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    """Blocks of a file that are those of another file: each is whole for itself, and only our checksums tell."""
    path = tmp_path / INFO.name
    path.write_bytes(CONTENT)
    with RowFile(tmp_path, INFO, T) as file:
        file.open()
        path.write_bytes(OTHER)
        found, packed = zlib.crc32(OTHER_RECORDS[3]), zlib.crc32(RECORDS[3])
        with pytest.raises(BadRow, match=rf"row 3 of .* \(its CRC-32 is {found:08x}, not {packed:08x}\)"):
            file.read(3)
    with (
        RowFile(tmp_path, INFO, T) as file,
        pytest.raises(BadRow, match="CRC-32 of its checksums .* its manifest says"),
    ):
        file.read(3)


def test_files_without_checksums_are_read_and_their_lengths_checked(tmp_path: Path) -> None:
    """As they were written before there were any."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "rows"), "group_size:1,uncompressed")
    for record in [*RECORDS[1:], b"short"]:
        writer.write(record)
    writer.close()
    with RowFile(tmp_path, FileInfo("rows", ROWS, 0, ""), T) as file:
        assert file.read_range(0, ROWS - 1) == RECORDS[1:]
        for read in (lambda: file.read(ROWS - 1), lambda: file.read_range(0, ROWS)):
            with pytest.raises(BadRow, match=r"row 6 of .* \(it has 5 bytes, not 36\)"):
                read()


@pytest.fixture
def packed(tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> Path:
    pack_texts(modules[:1], tokenizer, tmp_path / "packed", 64, validation_fraction=0, rows_per_file=100)
    return tmp_path / "packed"


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def test_files_are_checked_before_they_are_used(packed: Path) -> None:
    manifest = load_manifest(packed)
    check_files(packed, manifest, "train")
    first, second, *_ = (packed / info.name for info in manifest.train.files)
    content = first.read_bytes()

    def assert_found(kind: type[Exception], message: str) -> None:
        start = re.escape(f"data.sources.path = {str(packed)!r} is ")
        with pytest.raises(kind, match=f"^{start}{message}$"):
            check_files(packed, manifest, "train")

    first.write_bytes(content[:-1])
    assert_found(
        ValueError, f"damaged: {first.name} has {len(content) - 1} bytes where its manifest says {len(content)}."
    )
    first.write_bytes(content + b"\0")
    assert_found(
        ValueError, f"damaged: {first.name} has {len(content) + 1} bytes where its manifest says {len(content)}."
    )
    first.write_bytes(bytes(len(content)))
    assert_found(ValueError, f"damaged: {first.name}: it can't be opened: .*")
    assert manifest.train.files[0].size == manifest.train.files[1].size
    shutil.copy(second, first)
    assert_found(
        ValueError, f"damaged: {first.name}: the CRC-32 of its checksums is .{{8}} where its manifest says .{{8}}."
    )
    first.unlink()
    assert_found(FileNotFoundError, f"incomplete: {first.name} is missing.")
    first.mkdir()
    assert_found(FileNotFoundError, f"incomplete: {first.name} is missing.")


@pytest.mark.parametrize("field", ["rows", "size", "name", "rows_crc32"])
def test_a_manifest_that_is_damaged_itself(packed: Path, field: str) -> None:
    fields = json.loads((packed / "manifest.json").read_text())
    fields["train"]["files"][0][field] = "nothing" if field == "name" else 5
    (packed / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises((ValueError, FileNotFoundError), match=r"data.sources.path = .* is (damaged|incomplete): "):
        check_files(packed, load_manifest(packed), "train")


@given(st.data())
@settings(max_examples=60)
def test_a_bit_of_a_manifest_is_found_or_changes_no_row(tokenizer: Tokenizer, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows")
        pack_texts(["some text of some length"], tokenizer, out, 4, validation_fraction=0)
        rows, file = read_rows(out, "train"), out / "manifest.json"
        place = data.draw(st.integers(0, file.stat().st_size - 1))
        bit = data.draw(st.integers(0, 7))
        change(file, lambda b: b[:place] + bytes([b[place] ^ 1 << bit]) + b[place + 1 :])
        try:
            manifest = load_manifest(out)
            check_files(out, manifest, "train")
            found = read_rows(out, "train")
        except (ValueError, FileNotFoundError) as error:
            assert str(out) in str(error)
            return
        np.testing.assert_array_equal(found, rows)


def test_reading_in_order_names_a_bad_row(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loses none: behind the end of a file that has shrunk, ArrayRecord finds nothing and says nothing."""
    manifest = load_manifest(packed)
    (source,) = find_sources([packed])
    info = manifest.train.files[1]
    before = np.concatenate(list(iterate_rows(packed, "train")))
    monkeypatch.setattr(packing, "_CHUNK_TOKENS", 640)
    chunks = iterate_rows(packed, "train")
    assert len(next(chunks)) == 10
    os.truncate(packed / info.name, info.size // 2)
    found: list[np.ndarray] = []
    with pytest.raises(BadRow, match=rf"row \d+ of '{re.escape(str(packed / info.name))}' can't be read"):
        found += chunks
    for chunk in found:
        assert len(chunk) in (10, info.rows % 10 or 10)
    position = (info.rows + manifest.train.files[0].rows - 1) * manifest.sequence_length
    with pytest.raises(BadRow, match=rf"row {info.rows - 1} of "):
        read_document(source, "train", position, 10)
    assert len(before) == manifest.train.rows


def test_a_file_that_may_not_be_read(packed: Path) -> None:
    """By another user, since nothing is forbidden to root."""
    name = load_manifest(packed).train.files[0].name
    with tempfile.TemporaryDirectory() as folder:
        out = shutil.copytree(packed, Path(folder, "rows"))
        (out / name).chmod(0)
        Path(folder).chmod(0o755)
        code = f"""
import os
from array_record.python import array_record_module
from bc2_jax.data import packing
from bc2_jax.data.packing import check_files, load_manifest
if os.geteuid() == 0:
    os.setuid(65534)
check_files({str(out)!r}, load_manifest({str(out)!r}), "train")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(f"is damaged: {name}: it can't be opened: .*Permission denied.*{out / name}", done.stderr)
