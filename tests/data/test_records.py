"""Lists and objects of several lines; `test_documents` has what lines and tables can suffer."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.data.records import Invalid, Record, read_records

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), VALUES, min_size=1), min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 3), is_list=st.booleans(), mark=st.booleans(),
)  # fmt: skip
def test_records_do_not_depend_on_the_layout(tmp_path_factory, records, indent, is_list, mark):
    path = tmp_path_factory.getbasetemp() / "layout.json"
    texts = [json.dumps(record, indent=indent) for record in records]
    text = json.dumps(records, indent=indent) if is_list else "\n".join(texts)
    path.write_text(("\ufeff" if mark else "") + text + "\n")
    found = list(read_records(str(path)))
    assert [record.value for record in found if isinstance(record, Record)] == records
    lines = text.split("\n")
    for i, record in enumerate(found):
        number, _, item = record.where.removeprefix(f"{path}:").partition(" ")
        assert item == (f"(item {i + 1})" if is_list else "")
        assert "{" in lines[int(number) - 1]


@pytest.mark.parametrize(
    ("content", "values", "problem"),
    [
        (b"[]", [], ""),
        (b'[{"a": 1},\n {"a": 2},\n {"a": }]', [1, 2], "x.json:3 (item 3): it is not JSON (Expecting value"),
        (
            b'[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            [1, 2],
            "x.json:3: the list does not continue with a comma or end; ",
        ),
        (b'[{"a": 1},\n {"a": 2}', [1, 2], "x.json:2: the list has no end"),
        (b'[{"a": 1},\n {"a": "\xff"}]', [1], "x.json:2 (item 2): it is not UTF-8 (invalid start byte); this and what"),
        (b'[{"a": 1},', [1], "x.json:1: the list has no end"),
        (b'{"a": 1}\n{"a": 2\n{"a": 3}\n', [1, 3], "x.json:2: the line is not JSON (Expecting ',' delimiter"),
        (b'{"a": 1\n{"a": 2}\n', [2], "x.json:1: the line is not JSON (Expecting ',' delimiter"),
        (b'{\n"a": 1}\n{"a"\n:2}', [1, 2], ""),
    ],
    ids=str,
)
def test_damaged_json(tmp_path: Path, content: bytes, values: list[int], problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    found = list(read_records(str(path), "x.json"))
    assert [record.value["a"] for record in found if isinstance(record, Record)] == values
    problems = [str(record) for record in found if isinstance(record, Invalid)]
    assert len(problems) == bool(problem) and all(said.startswith(problem) for said in problems)


def test_a_list_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    content = json.dumps(
        [{"n": i, "text": hashlib.sha256(bytes([i])).hexdigest() + "书"} for i in range(200)], ensure_ascii=False
    ).encode()
    path.write_bytes(gzip.compress(content)[:-200])
    *whole, last = read_records(str(path))
    assert [record.value["n"] for record in whole if isinstance(record, Record)] == list(range(len(whole)))
    assert len(whole) > 50 and isinstance(last, Invalid)
    assert last.reason == "the gzip data ends in the middle; this and what follows in the file is lost"


def test_nested_text_that_is_no_text(tmp_path: Path) -> None:
    """Arrow does not check what it is told to be UTF-8."""
    content = pyarrow.array([b"good", b"\xff", b"also"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, content.buffers())
    rows = pyarrow.StructArray.from_arrays([column], ["content"])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"message": rows}), path)
    first, bad, last = read_records(str(path))
    assert first == Record({"message": {"content": "good"}}, f"{path}:1", 1)
    assert str(bad) == f"{path}:2: field 'message' is not UTF-8 (invalid start byte at byte 0)"
    assert last == Record({"message": {"content": "also"}}, f"{path}:3", 3)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = read_records(str(tmp_path / "a.jsonl"))
    assert isinstance(problem, Invalid) and "No such file" in problem.reason
