from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bc2_jax.curate.inputs import ReadConfig, default_source, plan_units
from bc2_jax.data.text_files import TextFile, find_text_files


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_finds_files_in_order_and_says_what_it_skipped(tmp_path: Path):
    for name in ("b/2.jsonl", "b/10.jsonl.zst", "a.parquet", "c.txt.gz", "z.json.gz", "notes.pdf", ".hidden/x.jsonl"):
        write(tmp_path / "in" / name)
    single = write(tmp_path / "single.jsonl", b"123")
    inputs = find_text_files([str(single), str(tmp_path / "in")])
    assert [f.name for f in inputs.files] == [
        "single.jsonl", "a.parquet", "b/10.jsonl.zst", "b/2.jsonl", "c.txt.gz", "z.json.gz"
    ]  # fmt: skip
    assert [(f.kind, f.compression) for f in inputs.files[1:5]] == [
        ("parquet", None), ("jsonl", "zstd"), ("jsonl", None), ("text", "gzip")
    ]  # fmt: skip
    assert inputs.files[0].size == 3
    assert sorted(os.path.basename(p) for p in inputs.skipped) == ["notes.pdf", "x.jsonl"]


def test_bad_paths_are_one_sentence(tmp_path: Path):
    pdf = write(tmp_path / "a.pdf")
    jsonl = write(tmp_path / "d" / "a.jsonl")
    for paths, legal in (
        ([], "at least one file or folder"),
        ([str(tmp_path / "none")], "there is no such file or folder"),
        ([str(pdf)], "files must be .jsonl"),
        ([str(jsonl), str(jsonl.parent)], "is named more than once"),
    ):
        with pytest.raises(ValueError, match=rf"^paths = .* is not valid: .*{legal}.*\.$"):
            find_text_files(paths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing to read"):
        find_text_files([str(tmp_path / "empty")])


def test_the_same_name_in_two_folders_stays_apart(tmp_path: Path):
    folders = [write(tmp_path / name / "a.jsonl").parent for name in ("x", "y")]
    files = find_text_files([str(folder) for folder in folders]).files
    assert [f.name for f in files] == [str(folder / "a.jsonl") for folder in folders]


def test_names_that_are_not_utf8(tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as stream:
        stream.write(b"{}\n")
    (file,) = find_text_files([str(tmp_path)]).files
    assert file.name == "caf\\xe9.jsonl"
    assert pickle.loads(pickle.dumps(file)) == file
    assert os.path.getsize(file.path) == 3


def test_a_link_that_leads_back_is_walked_once(tmp_path: Path):
    write(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [f.name for f in find_text_files([str(tmp_path / "in")]).files] == ["a.jsonl"]


def test_a_store_is_walked_like_a_folder(tmp_path: Path):
    write(tmp_path / "in" / "b" / "x.jsonl")
    write(tmp_path / "in" / "a.parquet")
    (local, stored) = (find_text_files([prefix + str(tmp_path / "in")]).files for prefix in ("", "file://"))
    assert stored == local and len(local) == 2


@pytest.mark.parametrize(
    ("path", "name", "source"),
    [
        ("/d/zh-00001-of-00010.jsonl.zst", "zh-00001-of-00010.jsonl.zst", "zh"),
        ("/d/web/c4-train.00000-of-01024.json.gz", "web/c4-train.00000-of-01024.json.gz", "c4"),
        ("/d/web/0001.parquet", "web/0001.parquet", "web"),
        ("/d/web/part-0001.parquet", "part-0001.parquet", "web"),
        ("/d/code.jsonl", "code.jsonl", "code"),
        ("/d/books/emma.txt", "books/emma.txt", "books"),
    ],
)
def test_default_source(path: str, name: str, source: str):
    kind = "text" if ".txt" in path else "jsonl"
    assert default_source(TextFile(path, name, kind, None, 1)) == source


def test_units(tmp_path: Path):
    write(tmp_path / "a.jsonl", b"x" * 250)
    write(tmp_path / "b.jsonl.gz", b"x" * 250)
    write(tmp_path / "c.jsonl", b"")
    table = pa.table({"text": ["x" * 40] * 100})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=10, use_dictionary=False, compression="NONE")
    for i in range(5):
        write(tmp_path / f"e{i}.txt", b"x" * 40)
    write(tmp_path / "f.parquet", b"no parquet")
    files = find_text_files([str(tmp_path)]).files
    units = plan_units(files, ReadConfig(unit_bytes=100))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert pickle.loads(pickle.dumps(units)) == units == plan_units(files, ReadConfig(unit_bytes=100))
    planned = [(tuple(f.name for f in u.files), u.start, u.stop) for u in units]
    assert planned == [
        (("a.jsonl",), 0, 100), (("a.jsonl",), 100, 200), (("a.jsonl",), 200, 250),
        (("b.jsonl.gz",), 0, 250),
        (("c.jsonl",), 0, 0),
        *((("d.parquet",), i, i + 1) for i in range(10)),
        (("e0.txt", "e1.txt"), 0, 2), (("e2.txt", "e3.txt"), 0, 2), (("e4.txt",), 0, 1),
        (("f.parquet",), 0, 0),
    ]  # fmt: skip
    assert [(u.start, u.stop) for u in plan_units(files, ReadConfig()) if u.files[0].name == "d.parquet"] == [(0, 10)]


@pytest.mark.parametrize("field", ["unit_bytes", "shard_bytes", "max_document_bytes", "text_field"])
def test_config_is_checked(field: str):
    with pytest.raises(ValueError, match=rf"^read\.{field} = .* is not valid"):
        ReadConfig(**{field: "" if field == "text_field" else 0})
