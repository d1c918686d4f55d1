"""Reading against the file read whole by the json module, and every kind of bad input."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tempfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bc2_jax.curate.inputs import ReadConfig, Unit, plan_units
from bc2_jax.curate.problems import LISTED, Problem, UnitReport, number_lines, problems_table
from bc2_jax.curate.reading import Rows, read_unit
from bc2_jax.data.parquet import largest_page
from bc2_jax.data.text_files import find_text_files


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def read(*paths: Path | str, **config) -> tuple[Rows, list[Problem], list[UnitReport]]:
    """All documents, the problems with absolute line numbers, and the reports."""
    settings = ReadConfig(**config)
    units = plan_units(find_text_files([str(path) for path in paths]).files, settings)
    return read_units(units, settings)


def read_units(units: list[Unit], config: ReadConfig) -> tuple[Rows, list[Problem], list[UnitReport]]:
    rows, reports = Rows(), []
    for unit in units:
        report = UnitReport(unit.index)
        for batch in read_unit(unit, config, report):
            for mine, new in zip(vars(rows).values(), vars(batch).values(), strict=True):
                mine.extend(new)
        reports.append(report)
    numbered = number_lines((r, u.files[0].name, u.start) for r, u in zip(reports, units, strict=True))
    return rows, [problem for report in numbered for problem in report.problems], reports


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


def reasons(problems: list[Problem]) -> list[tuple[int, str]]:
    return [(problem.line, problem.reason) for problem in problems]


PIECE = st.one_of(
    st.text(max_size=6).map(lambda text: json.dumps({"text": text}).encode()),
    st.binary(max_size=6),
    st.sampled_from([b"", b"\r", b"\xef\xbb\xbf", b'{"text": 1}', b"\xff", b'{"text": "\\ud800"}', b" " * 300]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(PIECE), st.sampled_from([b"", b"\n", b"\n\n"]), st.integers(1, 60))
@example([b'{"text": "a"}', b'{"text": "b"}'], b"\n", 14)
@example([b'{"text": "a"}', b'{"text": "b"}'], b"", 13)
def test_units_cut_anywhere_give_what_the_whole_file_gives(pieces: list[bytes], end: bytes, size: int):
    data = b"\n".join(pieces) + end
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        rows, problems, reports = read(path, unit_bytes=size, max_document_bytes=100)
    texts, names, bad = [], [], []
    byte = 0
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            line = raw.removeprefix(b"\xef\xbb\xbf")  # of files that were joined
            if line.decode().strip() or len(raw) > 250:
                text = json.loads(line)["text"]
                text.encode()
                texts.append(text)
                names.append(f"a.jsonl@{byte}")
        except (ValueError, TypeError, LookupError, AttributeError):
            bad.append((number, byte))
        byte += len(raw) + 1
    assert rows.texts == texts
    assert rows.ids == names
    assert [(p.line, p.byte) for p in problems if p.byte >= 0] == bad
    assert sum(report.lines for report in reports) == data.count(b"\n") + (data[-1:] not in (b"\n", b""))
    assert sum(report.raw_bytes for report in reports) == len(data)


def test_fields_of_a_row(tmp_path: Path):
    raw = [
        lines({"text": "a", "id": "x", "source": "books", "language": "en"}),
        lines({"text": "b", "id": 7, "extra": {"deep": [1]}}),
        lines({"text": "c", "id": None, "source": 3.5}),
        lines({"text": "d", "id": "\ud800", "source": "s" * 600}),
    ]
    (tmp_path / "web-0003.jsonl").write_bytes(b"".join(raw))
    rows, problems, reports = read(tmp_path)
    assert rows.texts == ["a", "b", "c", "d"]
    assert rows.ids == ["x", "7", f"web-0003.jsonl@{len(raw[0] + raw[1])}", "\\ud800"]
    assert rows.sources == ["books", "web", "web", "web"]
    assert rows.languages == ["en", "", "", ""]
    assert not problems
    assert reports[0].text_bytes == 4


def test_other_field_names(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines({"content": "a", "url": "u", "text": 1}))
    rows, problems, _ = read(tmp_path, text_field="content", id_field="url")
    assert (rows.texts, rows.ids, problems) == (["a"], ["u"], [])


def test_rows_that_hold_no_text(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    bad = [
        {"body": "x"},
        {"text": None},
        {"text": 3},
        {"text": ["x"]},
        {"text": {"x": 1}},
        {"text": True},
        "text",
        [1],
        5,
    ]
    path.write_bytes(lines({"text": "good"}, *bad, {"text": "\ud800"}, {"text": "last"}))
    rows, problems, reports = read(path)
    assert rows.texts == ["good", "last"]
    assert reasons(problems) == [
        (2, "the row has no field 'text'"),
        (3, "field 'text' is null, not a string"),
        (4, "field 'text' is a number, not a string"),
        (5, "field 'text' is a list, not a string"),
        (6, "field 'text' is an object, not a string"),
        (7, "field 'text' is a truth value, not a string"),
        (8, "the row is not an object"),
        (9, "the row is not an object"),
        (10, "the row is not an object"),
        (11, "field 'text' has half of a surrogate pair"),
    ]
    assert reports[0].lost.total() == 10
    assert problems_table(reports).num_rows == 10


def test_lines_that_are_no_json(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "BOM"}\r\n'  # fine
        b'{"text": "caf\xe9"}\n'
        b'{"text": "cut\n'
        b"\n \r\n"  # blank lines hold nothing
        b'{"text": "n\x00ul"}\n'
        b'{"text": "a"}{"text": "b"}\n' + b"[" * 100_000 + b'\n{"text": "no newline \\u0000"}'
    )
    rows, problems, reports = read(path)
    assert rows.texts == ["BOM", "no newline \x00"]
    not_json = "the line is not JSON"
    assert reasons(problems) == [
        (2, "the line is not UTF-8"),
        (3, not_json),
        (6, not_json),
        (7, not_json),
        (8, not_json),
    ]
    assert problems[0].excerpt == '{"text": "caf\\xe9"}'
    assert problems[2].excerpt == '{"text": "n\\x00ul"}'
    assert reports[0].lines == 9


@pytest.mark.parametrize("unit_bytes", [1 << 20, 1000])
def test_long_lines_are_skipped(tmp_path: Path, unit_bytes: int):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x" * 99}, {"text": "y" * 101}, {"text": "z" * 5000}, {"text": "last"}))
    rows, problems, _ = read(path, max_document_bytes=100, unit_bytes=unit_bytes)
    assert [text[:4] for text in rows.texts] == ["xxxx", "last"]
    assert reasons(problems) == [
        (2, "the text is longer than max_document_bytes"),
        (3, "the line is longer than 2.5 * max_document_bytes"),
    ]
    assert problems[1].excerpt.startswith('5012 bytes: {"text": "zzz')


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_a_line_longer_than_every_buffer(tmp_path: Path, name: str):
    """Several pieces are read, and the line is never whole in memory."""
    data = lines({"text": "first"}) + b'{"text": "' + b"x" * (9 << 20) + b'"}\n' + lines({"text": "last"})
    compress = {"zst": zstd, "gz": gzip.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(compress(data))
    rows, problems, reports = read(tmp_path, max_document_bytes=1 << 20, unit_bytes=4 << 20)
    assert rows.texts == ["first", "last"]
    assert reasons(problems) == [(2, "the line is longer than 2.5 * max_document_bytes")]
    assert problems[0].byte == len(lines({"text": "first"}))
    assert sum(report.lines for report in reports) == 3


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_compressed_files_that_end_or_break(tmp_path: Path, suffix: str):
    words = random.Random(0)
    texts = [f"line {i} " + words.randbytes(20).hex() for i in range(20_000)]
    whole = lines(*({"text": text} for text in texts))
    packed = zstd(whole) if suffix == "zst" else gzip.compress(whole)
    broken = bytearray(packed)
    broken[len(broken) // 2 : len(broken) // 2 + 64] = bytes(64)
    cases = {
        "cut": packed[: len(packed) // 2],
        "tail": packed[:-2],
        "broken": bytes(broken),
        "garbage": packed + b"rest",
    }
    for case, data in cases.items():
        path = tmp_path / f"{case}.jsonl.{suffix}"
        path.write_bytes(data)
        rows, problems, reports = read(path)
        # A piece of 64 KiB and a block of the format are lost before the place.
        assert rows.texts == texts[: len(rows.texts)] or case == "broken"
        assert len(rows.texts) > (5000 if case in ("cut", "broken") else 18_500), case
        last = problems[-1]
        assert last.reason == "the rest of the file is lost: it cannot be decompressed"
        assert last.line == reports[0].lines + 1 and last.byte > 0
    # Frames that follow each other are one file.
    (tmp_path / f"two.jsonl.{suffix}").write_bytes(packed + packed)
    assert read(tmp_path / f"two.jsonl.{suffix}")[0].texts == texts + texts


def test_files_that_change_or_vanish(tmp_path: Path):
    data = lines(*({"text": str(i)} for i in range(100)))
    for name in ("shrunk.jsonl", "gone.jsonl", "empty.jsonl", "gone.txt", "gone.parquet"):
        (tmp_path / name).write_bytes(data if "empty" not in name else b"")
    config = ReadConfig(unit_bytes=500)
    units = plan_units(find_text_files([str(tmp_path)]).files, config)
    for path in tmp_path.glob("gone*"):
        path.unlink()
    (tmp_path / "shrunk.jsonl").write_bytes(data[:700])
    rows, problems, _ = read_units(units, config)
    assert rows.texts == [json.loads(line)["text"] for line in data[:700].split(b"\n")[:-1]]
    found = {(problem.file, problem.reason) for problem in problems}
    changed = "the file has changed since it was planned"
    assert found >= {("shrunk.jsonl", changed), ("gone.jsonl", "cannot be read"), ("gone.txt", "cannot be read")}
    assert found >= {("empty.jsonl", "the file is empty"), ("gone.parquet", "cannot be read")}
    assert f"700 bytes instead of {len(data)}" in [problem.excerpt for problem in problems]


def test_text_files(tmp_path: Path):
    files = {
        "b/good.txt": "\ufeffeins\r\nzwei".encode(), "b/packed.txt.zst": zstd(b"drei"),
        "b/empty.txt": b"", "b/gbk.txt": "中文".encode("gbk"), "b/long.txt": "中".encode() * 1000,
        "b/cut.txt.gz": gzip.compress(b"vier")[:-9],
    }  # fmt: skip
    (tmp_path / "b").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows, problems, _ = read(tmp_path, max_document_bytes=1000)
    assert rows.texts == ["eins\r\nzwei", "drei"]
    assert rows.ids == ["b/good.txt", "b/packed.txt.zst"]
    assert rows.sources == ["b", "b"]
    assert {problem.file: problem.reason for problem in problems} == {
        "b/empty.txt": "the file is empty",
        "b/gbk.txt": "the file is not UTF-8",
        "b/long.txt": "the text is longer than max_document_bytes",
        "b/cut.txt.gz": "cannot be decompressed",
    }


def test_parquet(tmp_path: Path):
    raw = pa.array([b"a", b"\xff", b"c", b"d" * 2000, None, "文".encode()], pa.binary())
    text = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:], raw.buffers()[0])
    table = pa.table({"text": text, "id": [10, 11, 12, 13, 14, 15], "source": pa.array(["s"] * 6).dictionary_encode()})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2, write_statistics=False)
    for unit_bytes in (1, 1 << 20):
        rows, problems, reports = read(tmp_path, max_document_bytes=1500, unit_bytes=unit_bytes)
        assert rows.texts == ["a", "c", "文"]
        assert rows.ids == ["10", "12", "15"]
        assert rows.sources == ["s", "s", "s"]
        assert reasons(problems) == [
            (2, "field 'text' is not UTF-8"),
            (4, "the text is longer than max_document_bytes"),
            (5, "field 'text' is null, not a string"),
        ]
        assert sum(report.raw_bytes for report in reports) > 0


def test_parquet_of_other_schemas(tmp_path: Path):
    strings = pa.array(["a", "b"])
    columns = {
        "large": strings.cast(pa.large_string()), "view": strings.cast(pa.string_view()),
        "dictionary": strings.dictionary_encode(),
        "numbers": pa.array([1, 2]), "lists": pa.array([["a"], ["b"]]), "structs": pa.array([{"x": "a"}, None]),
    }  # fmt: skip
    for name, column in columns.items():
        pq.write_table(pa.table({"text": column, "id": [[1], [2]]}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"body": strings}), tmp_path / "missing.parquet")
    rows, problems, _ = read(tmp_path)
    assert rows.texts == ["a", "b"] * 3
    assert rows.ids[:2] == ["dictionary.parquet@1", "dictionary.parquet@2"]
    assert {problem.file: (problem.reason, problem.rows) for problem in problems} == {
        "numbers.parquet": ("column 'text' is int64, not a string", 2),
        "lists.parquet": ("column 'text' is list<element: string>, not a string", 2),
        "structs.parquet": ("column 'text' is struct<x: string>, not a string", 2),
        "missing.parquet": ("the file has no single column 'text'", 2),
    }


def test_a_broken_row_group_costs_no_other(tmp_path: Path):
    path = tmp_path / "p.parquet"
    words = random.Random(0)
    texts = [words.randbytes(100).hex() for _ in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, use_dictionary=False, compression="zstd")
    group = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    rows, problems, _ = read(path)
    assert rows.texts == texts[:100] + texts[200:]
    assert [(p.line, p.reason, p.rows) for p in problems] == [(101, "the rest of the row group cannot be read", 100)]
    for name, part in (("cut", data[: len(data) // 2]), ("tiny", b"PAR1"), ("text", b"hello world, no parquet")):
        (tmp_path / f"{name}.parquet").write_bytes(part)
        rows, problems, _ = read(tmp_path / f"{name}.parquet")
        assert (rows.texts, [p.reason for p in problems]) == ([], ["the file is not a complete Parquet file"])


@pytest.mark.parametrize(
    "options", [{"use_dictionary": False}, {}, {"data_page_version": "2.0", "compression": "zstd"}]
)
def test_a_giant_cell_is_not_read(tmp_path: Path, options: dict):
    random_text = random.Random(0).randbytes(100_000).hex()
    texts = ["small"] * 10 + [random_text] + ["small"] * 10 + ["last"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "p.parquet", row_group_size=21, **options)
    with open(tmp_path / "p.parquet", "rb") as stream:
        column = pq.read_metadata(tmp_path / "p.parquet").row_group(0).column(0)
        size = largest_page(stream, column)
    # Everything is in one page, with four bytes of length a value.
    assert len(random_text) + 4 <= size <= column.total_uncompressed_size
    rows, problems, _ = read(tmp_path, max_document_bytes=1000)
    assert rows.texts == ["last"]
    assert [(p.line, p.reason, p.rows) for p in problems] == [
        (1, "the row group has a page of more than 8 * max_document_bytes", 21)
    ]
    assert problems[0].excerpt == f"{size} bytes"


def test_the_largest_page_of_many(tmp_path: Path):
    texts = [str(i) * 100 for i in range(5000)]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "p.parquet", use_dictionary=False, data_page_size=10_000, write_batch_size=10)
    column = pq.read_metadata(tmp_path / "p.parquet").row_group(0).column(0)
    with open(tmp_path / "p.parquet", "rb") as stream:
        assert 10_000 <= largest_page(stream, column) <= 20_000


def test_a_parquet_file_that_was_replaced(tmp_path: Path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(10)]}), path, row_group_size=1)
    config = ReadConfig(unit_bytes=1)
    units = plan_units(find_text_files([str(path)]).files, config)
    pq.write_table(pa.table({"text": ["new", "newer"]}), path, row_group_size=1)
    rows, problems, _ = read_units(units, config)
    assert len(units) == 10 and rows.texts == ["new", "newer"]
    assert [p.reason for p in problems].count("row groups are missing") == 8
    assert [p.reason for p in problems].count("the file has changed since it was planned") == 10
    # And one whose footer could not be read at first.
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    units = plan_units(find_text_files([str(path)]).files, config)
    path.write_bytes(data)
    assert read_units(units, config)[0].texts == ["new", "newer"]


def test_everything_is_counted_and_some_is_listed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"garbage\n" * 5000)
    _, problems, (report,) = read(tmp_path)
    assert len(problems) == LISTED
    assert report.reasons == {"the line is not JSON": 5000}
    assert report.lost.total() == 5000


def test_names_that_are_not_utf8_are_read(tmp_path: Path):
    with open(os.fsencode(tmp_path) + b"/\xe9.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(lines({"text": "a"}, 5)))
    rows, problems, _ = read(tmp_path)
    assert (rows.texts, rows.ids, rows.sources) == (["a"], ["\\xe9.jsonl.gz@0"], ["\\xe9"])
    assert problems[0].file == "\\xe9.jsonl.gz"


def test_files_in_a_store(tmp_path: Path):
    """The local file system by URI goes the way of every object store."""
    whole = lines({"text": "a"}, {"text": "b"}, 3)
    (tmp_path / "a.jsonl").write_bytes(whole)
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(whole))
    (tmp_path / "c.txt").write_bytes(b"c")
    pq.write_table(pa.table({"text": ["d"]}), tmp_path / "d.parquet")
    local, stored = (read(prefix + str(tmp_path), unit_bytes=15) for prefix in ("", "file://"))
    assert local[0].texts == ["a", "b", "a", "b", "c", "d"]
    assert stored == local


@given(st.binary(max_size=200))
@example(b"\x15\x00\x15\x80\x80")
@example(b"\x3c" * 100)
def test_page_headers_may_be_anything(data: bytes):
    class Column:
        dictionary_page_offset, data_page_offset, total_compressed_size = None, 4, 200

    assert largest_page(io.BytesIO(b"PAR1" + data), Column()) >= 0


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-be", "big5"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_files_in_another_encoding(tmp_path: Path, encoding: str, name: str):
    texts = [f"第{i}行的文字\u3000\u4e0a" for i in range(200)]
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if name == "a.txt":
        content, texts = texts[0], texts[:1]
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows, _, _ = read(tmp_path / name, encoding=encoding, unit_bytes=500)
    assert rows.texts == texts
    rows, _, reports = read(tmp_path / name)
    assert rows.texts == []
    if encoding in ("gb18030", "utf-16"):
        assert f"--encoding {encoding}" in " ".join(reason for report in reports for reason in report.reasons)


def test_lines_that_are_not_in_the_encoding_are_named(tmp_path: Path):
    good = [json.dumps({"text": text}, ensure_ascii=False).encode("gb18030") for text in ("第一", "第二")]
    (tmp_path / "a.jsonl").write_bytes(good[0] + b'\n{"text": "\xff"}\n' + good[1] + b"\n")
    rows, _, (report,) = read(tmp_path / "a.jsonl", encoding="gb18030")
    assert rows.texts == ["第一", "第二"] and dict(report.reasons) == {"the line is not GB18030": 1}


def test_a_long_text_in_another_encoding_is_not_cut(tmp_path: Path):
    for size, rows_read in ((1000, 1), (1001, 0), (5000, 0)):
        (tmp_path / "a.txt").write_text("x" * size, "utf-16")
        rows, _, (report,) = read(tmp_path / "a.txt", encoding="utf-16", max_document_bytes=1000)
        assert [len(text) for text in rows.texts] == [size] * rows_read and sum(report.lost.values()) == 1 - rows_read


@pytest.mark.parametrize("tail", [b"", b"\0" * 700, b"\0" * 5000])
def test_gzip_with_padding_is_read_whole(tmp_path: Path, tail: bytes):
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]) + tail)
    rows, _, (report,) = read(tmp_path / "a.jsonl.gz")
    assert rows.texts == [f"text {i}" for i in range(300)] and not report.reasons


@pytest.mark.parametrize("cut", [1, 8, 9, 300])
def test_gzip_with_a_cut_tail_keeps_what_is_before(tmp_path: Path, cut: int):
    rng = random.Random(0)
    lines = [json.dumps({"text": f"{i} {rng.random()}"}) + "\n" for i in range(300)]
    data = gzip.compress("".join(lines).encode())[:-cut]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    whole = zlib.decompressobj(31).decompress(data).decode()
    rows, _, (report,) = read(tmp_path / "a.jsonl.gz")
    assert rows.texts == [json.loads(line)["text"] for line in whole.split("\n")[:-1]] and len(rows.texts) > 250
    assert dict(report.reasons) == {"the rest of the file is lost: it cannot be decompressed": 1}
    assert sum(report.lost.values()) == (whole[-1] != "\n")


def test_a_gzip_file_whose_checksum_is_wrong_keeps_its_lines(tmp_path: Path):
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)).encode()
    data = bytearray(gzip.compress(lines))
    data[-8] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    rows, _, (report,) = read(tmp_path / "a.jsonl.gz")
    assert len(rows.texts) == 9 and list(report.reasons) == ["the rest of the file is lost: it cannot be decompressed"]
