"""Files appear when they are complete, on a path and on a URI."""

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from bc2_jax.curate.storage import Folder


@pytest.fixture(params=["path", "uri"])
def folder(request, tmp_path):
    return Folder(tmp_path / "a" if request.param == "path" else (tmp_path / "a").as_uri())


def test_files_of_a_folder(folder):
    assert folder.names() == [] and not folder.exists("x.json")
    folder.write_json("x.json", {"好": [1, None]})
    table = pa.table({"doc": [1, 5, 9], "text": ["a", "b", None]})
    (folder / "sub").write_table("t.parquet", table)
    (folder / "sub").write_table("u.parquet", table.slice(0, 1))
    assert folder.read_json("x.json") == {"好": [1, None]}
    assert folder.names() == ["x.json"] and (folder / "sub").names(".parquet") == ["t.parquet", "u.parquet"]
    assert (folder / "sub").read_table("t.parquet") == table
    assert (folder / "sub").read_table("t.parquet", ["doc"]) == table.select(["doc"])
    assert (folder / "sub").select(ds.field("doc") < 5)["doc"].to_pylist() == [1, 1]
    folder.remove()
    folder.remove()
    assert folder.names() == [] and (folder / "sub").names() == []


def test_the_dataframe_engine_reads_the_same_place(folder):
    import daft

    folder.write_table("t.parquet", pa.table({"doc": [1, 2]}))
    assert daft.read_parquet(folder.pattern(".parquet")).to_pydict() == {"doc": [1, 2]}


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    folder = Folder(tmp_path)
    folder.write("a", b"old")
    with pytest.raises(TypeError):
        folder.write("a", "no bytes")
    assert folder.read("a") == b"old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_same_table_gives_the_same_bytes(tmp_path):
    folder = Folder(tmp_path)
    for name in ("a", "b"):
        folder.write_table(name, pa.table({"doc": list(range(1000)), "text": ["好"] * 1000}), "zstd")
    assert folder.read("a") == folder.read("b")


@pytest.mark.parametrize("location", ["path", "mock:///bucket"])
def test_bytes_are_written_as_they_are_whatever_the_name(tmp_path, location):
    """By default pyarrow compresses by the suffix."""
    folder = Folder(tmp_path if location == "path" else location)
    for name in ("a.zst", "a.gz"):
        folder.write(name, b"content" * 9)
        assert folder.read(name) == b"content" * 9
