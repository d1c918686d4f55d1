"""Every format, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data import documents
from bc2_jax.data.documents import Document, Fields, InvalidDocument, read_span, scan_file, why_no_text


def read(path: Path, span_bytes: int = 1 << 20, fields: Fields | None = None) -> list[Document | InvalidDocument]:
    fields = fields or Fields()
    spans = scan_file(path, fields, span_bytes).spans
    return [document for span in spans for document in read_span(span, fields)]


def texts(found: list[Document | InvalidDocument]) -> list[str]:
    return [document.text for document in found if isinstance(document, Document)]


def reasons(found: list[Document | InvalidDocument]) -> list[str]:
    return [document.reason for document in found if isinstance(document, InvalidDocument)]


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 100, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size, **options)
    return path


CURATED = [
    {"id": f"d{i}", "text": f"text {i}", "source": "书 a/b", "language": "en", "cluster": i, "score": i / 10,
     "weight": 1.0 + i}
    for i in range(11)
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.zst", ".json.gz", ".ndjson"])
def test_a_record_has_text_source_score_and_weight(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    lines = "".join(json.dumps(record) + "\n" for record in CURATED).encode()
    if suffix == ".parquet":
        write_parquet(path, CURATED, 4)
    else:
        pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(lines))
    assert read(path) == [
        Document(f"text {i}", "书 a/b", "en", i / 10, 1.0 + i, f"{path}:{i + 1}") for i in range(11)
    ]  # fmt: skip


def test_what_a_record_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    file, plain = tmp_path / "web" / "a.jsonl", tmp_path / "web" / "b.txt"
    file.write_text('{"text": "x", "source": null, "score": null}\n{"text": "y", "source": ""}\n{"text": ""}')
    plain.write_bytes(b"\xef\xbb\xbfz\r\n")
    found = read(file) + read(plain)
    assert texts(found) == ["x", "y", "", "z\r\n"]
    assert {(d.source, d.score, d.weight) for d in found if isinstance(d, Document)} == {("web", 1.0, 1.0)}


def test_other_names_of_fields(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"content": "x", "origin": "web", "text": 1}])
    assert read(path, fields=Fields(text="content", source="origin")) == [
        Document("x", "web", "unknown", 1.0, 1.0, f"{path}:1")
    ]


@given(
    st.lists(st.tuples(st.text(max_size=40), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"])), max_size=30),
    st.integers(1, 300),
)
def test_spans_cover_a_file_once_and_know_their_lines(records: list[tuple[str, str]], span_bytes: int) -> None:
    content = "".join(json.dumps({"text": text}) + end for text, end in records).encode().rstrip(b"\n")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        patch.setattr(documents, "_BLOCK", 64)
        scan = scan_file(path, Fields(), span_bytes)
        assert scan.sha256 == hashlib.sha256(content).hexdigest() and scan.size == len(content)
        assert sum(span.size for span in scan.spans) == len(content)
        found = [document for span in scan.spans for document in read_span(span, Fields())]
        assert texts(found) == [text for text, _ in records] and not reasons(found)
        lines = [number for number, line in enumerate(content.split(b"\n"), 1) if not line.isspace() and line]
        assert [document.where for document in found] == [f"{path}:{number}" for number in lines]


BAD = {
    b"{not json": "the line is not JSON",
    b'{"title": "no text"}': "the row has no field 'text'",
    b'["text"]': "the row is not an object",
    b'{"text": 7}': "field 'text' is a number, not a string",
    b'{"text": "a\\ud800"}': "field 'text' has half of a surrogate pair (at character 1)",
    b'{"text": "\xff"}': "the line is not UTF-8 (invalid start byte at byte 10)",
    b'{"text": "x", "source": 1}': "field 'source' is a number, not a string",
    b'{"text": "x", "score": 1.5}': "score = 1.5 is not valid: it must be in 0..1",
    b'{"text": "x", "score": NaN}': "score = nan is not valid: it must be in 0..1",
    b'{"text": "x", "score": true}': "score = True is not valid: it must be in 0..1",
    b'{"text": "x", "weight": 0}': "weight = 0 is not valid: it must be positive",
    b'{"text": "x", "weight": "2"}': "weight = '2' is not valid: it must be positive",
    b"[" * 100_000: "the line is not JSON",
}


@pytest.mark.parametrize("compressed", [False, True])
def test_bad_lines_are_named_and_reading_goes_on(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("a.jsonl.zst" if compressed else "a.jsonl")
    content = b"\n".join([b'{"text": "first"}', *BAD, b'{"text": "last"}'])
    path.write_bytes(zstandard.compress(content) if compressed else content)
    found = read(path)
    assert texts(found) == ["first", "last"]
    for number, (reason, expected) in enumerate(zip(reasons(found), BAD.values(), strict=True), 2):
        assert reason.startswith(f"{path}:{number}: {expected}")


def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 100)
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 1000}).encode()
    path.write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n' + long)
    found = read(path)
    assert texts(found) == ["a", "b"]
    assert reasons(found) == [
        f"{path}:2: the line is longer than 100 bytes (it has {len(long)} bytes)",
        f"{path}:4: the line is longer than 100 bytes (it has {len(long)} bytes)",
    ]


def test_zstandard_frames_and_where_they_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    lines = [json.dumps({"text": hashlib.sha256(bytes([i])).hexdigest() * 8}).encode() + b"\n" for i in range(200)]
    frames = [zstandard.compress(b"".join(lines[:50])), zstandard.compress(b"".join(lines[50:]))]
    path.write_bytes(b"".join(frames))
    whole = read(path)
    assert len(texts(whole)) == 200

    path.write_bytes(b"".join(frames)[:-1])
    found = read(path)
    assert found[:50] == whole[:50] and found[:-1] == whole[: len(found) - 1]
    assert reasons(found) == [
        f"{path}:{len(found)}: the rest of the file is lost: it cannot be decompressed "
        "(the Zstandard data ends in the middle)"
    ]
    path.write_bytes(frames[0] + b"garbage")
    found = read(path)
    assert found[:50] == whole[:50] and len(found) == 51
    lost = "the rest of the file is lost: it cannot be decompressed"
    assert reasons(found)[0].startswith(f"{path}:51: {lost} (the Zstandard data is damaged: ")


def test_damaged_parquet(tmp_path: Path) -> None:
    rows = [{"text": hashlib.sha256(bytes([i])).hexdigest()} for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", rows, 50, use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    scan = scan_file(path, Fields(), 1)
    assert [(span.start, span.first) for span in scan.spans] == [(0, 1), (1, 51), (2, 101), (3, 151)]
    assert texts(read(path)) == [row["text"] for row in rows]

    metadata = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    middle = metadata.data_page_offset + metadata.total_compressed_size // 2
    path.write_bytes(content[:middle] + b"!" + content[middle + 1 :])
    found = read(path)
    assert texts(found) == [row["text"] for row in rows[:50] + rows[100:]]
    (lost,) = (document for document in found if isinstance(document, InvalidDocument))
    assert lost.documents == 50 and lost.reason.startswith(
        f"{path}:51: the rest of the row group cannot be read (rows 51-100: "
    )

    path.write_bytes(content[:-20])
    scan = scan_file(path, Fields(), 1)
    assert scan.spans == () and scan.problem is not None
    assert scan.problem.startswith(f"{path}: the file is not a complete Parquet file (")


def test_parquet_that_is_not_what_it_says(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"body": "x", "id": 1}])
    problem = f"{path}: the file has no single column 'text'; its columns are body, id"
    assert scan_file(path, Fields(), 1).problem == problem
    # Arrow does not check what it is told to be UTF-8.
    content = pyarrow.array([b"good", b"\xff", b"also"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, content.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    found = read(path)
    assert texts(found) == ["good", "also"]
    assert reasons(found) == [f"{path}:2: field 'text' is not UTF-8 (invalid start byte at byte 0)"]


@pytest.mark.parametrize(
    ("suffix", "named", "module"), [(".parquet", ".parquet", "pyarrow"), (".jsonl.zst", ".zst", "zstandard")]
)
def test_a_missing_package_is_one_sentence(
    tmp_path: Path, suffix: str, named: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"content")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.parquet", None)
    with pytest.raises(ValueError, match=rf"{named} files need {module}: pip install 'bc2_jax\[data\]'\.$"):
        read(path)


def test_surrogates_are_found_in_long_texts() -> None:
    for text, place in (("x" * (3 << 20), 3 << 20), ("书" * (1 << 20), 1 << 20)):
        assert why_no_text({"a": text}, "a") is None
        half = f"field 'a' has half of a surrogate pair (at character {place})"
        assert why_no_text({"a": f"{text}\ud800"}, "a") == half
