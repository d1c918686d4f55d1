"""Damaged, missing and renamed files are named in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bc2_jax.evaluate.tasks.reading import (
    Row,
    files_by_name,
    find_folder,
    listing,
    missing_files,
    read_rows,
    require_file,
)
from tests.evaluate.tasks.files import write, write_csv

HEADER = ["id", "question", "A"]


def rows(path: Path, **more) -> list[dict]:
    return [dict(row.values) for row in read_rows(path, **more)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_table_is_the_same_from_windows(tmp_path, end, mark):
    path = write_csv(tmp_path / "t.csv", [HEADER, ["0", f"two{end}lines, a comma", '"x"'], ["1", "y", ""]], end)
    path.write_bytes(mark + path.read_bytes())
    assert rows(path, needed=HEADER) == [
        {"id": "0", "question": "two\nlines, a comma", "A": '"x"'},
        {"id": "1", "question": "y", "A": ""},
    ]


def test_rows_have_their_line(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b\n"1\n2",3\n\n4,5\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    assert [row.where for row in read_rows(path, columns=("x", "y"))] == [f"{path}:{line}" for line in (1, 2, 5)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,question,A\n0,x\n", r"t.csv:2: it has 2 columns instead of 3 \(id, question, A\)"),
        ("id,question,A\n0,x,y\n1,x,y,z\n", "t.csv:3: it has 4 columns instead of 3"),
        ('id,question,A\n0,"x,y\n1,x,y\n', "t.csv:2: it has 2 columns instead of 3"),
        ("id,frage,A\n0,x,y\n", "t.csv:1: the header lacks 'question'; it has id, frage, A"),
        (
            "id,question,A\n0,x,y\n1,题目,y\n".encode("gb18030"),
            r"t.csv:3: it is not UTF-8.*save the file as UTF-8",
        ),
        ("id,question,A\n", "t.csv holds no rows"),
        ("", "t.csv holds no rows"),
        ("id,question,A\n0," + "x" * 200_000 + ",y\n", r"t.csv:2: it is not CSV \(field larger than field limit"),
    ],
)
def test_damaged_tables(tmp_path, content, said):
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(ValueError, match=said):
        rows(path, needed=HEADER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "x"}\n{"question": \n', "t.jsonl:2: the line is not JSON"),
        ('{"question": "x"}\n["x"]\n', r"t.jsonl:2: it is \['x'\], not an object with question"),
        ('{"frage": "x"}\n', "t.jsonl:1: lacks 'question'; it has frage"),
        ("\n", "t.jsonl holds no rows"),
        (b'{"question": "x"}\n' + '{"question": "题目"}\n'.encode("gb18030"), "t.jsonl:2: the line is not UTF-8"),
    ],
)
def test_damaged_records(tmp_path, content, said):
    path = write(tmp_path / "t.jsonl", content)
    with pytest.raises(ValueError, match=said):
        rows(path, needed=("question",))


def test_records_of_every_kind_are_the_same(tmp_path):
    values = [{"question": "一", "answer": 1}, {"question": "b", "answer": 0}]
    write(tmp_path / "t.json", json.dumps(values))
    write(tmp_path / "t.jsonl", "\r\n".join(map(json.dumps, values)))
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "t.parquet")
    for suffix in ("json", "jsonl", "parquet"):
        assert rows(tmp_path / f"t.{suffix}", needed=("question", "answer")) == values


def test_fields():
    row = Row({"q": " \n", "n": 3, "a": " b ", "many": ["A", "C"], "text": "CA", "none": None, "bad": "F"}, "t:1")
    with pytest.raises(ValueError, match="t:1: 'q' is empty"):
        row.filled("q")
    with pytest.raises(ValueError, match="t:1: 'n' is 3; it must be text"):
        row.text("n")
    with pytest.raises(ValueError, match="t:1: 'absent' is missing among q, n, a"):
        row.text("absent")
    assert row.letter("a", "ABCD") == 1
    assert (row.answers("many", "ABCD"), row.answers("text", "ABCD"), row.answers("none", "ABCD")) == (
        [0, 2],
        [0, 2],
        [],
    )
    for field in ("bad", "many", "n", "absent", "q"):
        with pytest.raises(ValueError, match=f"t:1: '{field}' is .*; it must be one of A, B, C, D"):
            row.letter(field, "ABCD")


def test_options():
    two = ("x", "y")
    assert Row({"o": {"B": "y", "A": "x"}}, "t:1").options("o") == two
    assert Row({"o": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]}, "t:1").options("o") == two
    for value in ({"A": "x", "C": "y"}, ["x", "y"], None, {"A": "x", "B": None}):
        with pytest.raises(ValueError, match="t:1: 'o' "):
            Row({"o": value}, "t:1").options("o")


def find(data_dir: Path) -> Path:
    def holds(place: Path) -> bool:
        return (place / "val").is_dir()

    return find_folder(data_dir, ("ceval", "ceval-exam"), ("", "inner"), holds, "val, from there.")


@pytest.mark.parametrize("place", ["ceval", "C-Eval", "ceval_exam/inner", "", "inner"])
def test_where_a_benchmark_may_lie(tmp_path, place):
    (tmp_path / place / "val").mkdir(parents=True)
    (tmp_path / "mmlu" / "dev").mkdir(parents=True)
    assert find(tmp_path) == tmp_path / place


def test_what_is_not_there_is_described(tmp_path):
    write(tmp_path / "ceval" / "readme.md", "x")
    with pytest.raises(FileNotFoundError, match=r"ceval does not hold .* \(readme.md is there\): val, from there\."):
        find(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find(tmp_path / "nowhere")
    for n in range(20):
        write(tmp_path / "many" / f"{n:02}", "")
    assert listing(tmp_path / "many").endswith("11 and 8 more")


def test_a_renamed_file_is_recognised(tmp_path):
    write(tmp_path / "law-val.csv", "x")
    write(tmp_path / ".law_val.csv", "x")
    with pytest.raises(FileNotFoundError, match=r"law_val.csv is missing: the questions\. law-val.csv is there"):
        require_file(tmp_path / "law_val.csv", "the questions")
    with pytest.raises(ValueError, match=r"law-val.csv is not called \*_val.csv with \* a subject"):
        files_by_name(tmp_path, "*_val.csv", {"law"}, "a subject")
    (tmp_path / "law-val.csv").rename(tmp_path / "lew_val.csv")
    with pytest.raises(ValueError, match=r"did you mean law_val.csv\?"):
        files_by_name(tmp_path, "*_val.csv", {"law"}, "a subject")
    assert list(files_by_name(tmp_path, "*_val.csv", (), "a subject")) == ["lew"]
    assert "Only 1 of 2 files" in missing_files(tmp_path, ["lew_val.csv", "a.csv"])[0]
