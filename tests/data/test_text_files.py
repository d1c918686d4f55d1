"""Which files are read, and that no other goes without a word."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.data.text_files import find_text_files, kind_of


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(*paths: Path) -> list[str]:
    return [file.name for file in find_text_files([str(path) for path in paths]).files]


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


NAME = st.text(st.sampled_from("ab._[]*?%# 好{}\\"), min_size=1, max_size=6).filter(lambda name: set(name) != {"."})


@settings(max_examples=20)
@given(st.lists(st.tuples(NAME, st.sampled_from([".jsonl", ".JSON.gz", ".txt", ".md", ""])), max_size=6), NAME)
def test_every_file_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, files: list, folder: str):
    root = tmp_path_factory.mktemp("files") / folder
    for name, suffix in files:
        write(root / (name + suffix))
    write(root / "always.txt")
    found = find_text_files([str(root)])
    there = {str(path) for path in root.rglob("*") if path.is_file()}
    assert {file.path for file in found.files} | set(found.skipped) == there
    assert len(found.files) + len(found.skipped) == len(there)
    assert all(kind_of(file.path) and os.path.basename(file.path)[0] not in "._" for file in found.files)


def test_bad_paths_are_one_sentence(tmp_path: Path):
    pdf = write(tmp_path / "a.pdf")
    jsonl = write(tmp_path / "d" / "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    for paths, legal in (
        ([], "at least one file or folder"),
        ([str(tmp_path / "none")], "there is no such file or folder"),
        ([str(pdf)], "files must be .jsonl"),
        ([str(jsonl), str(jsonl.parent)], "is named more than once"),
        ([str(tmp_path / "pipe.jsonl")], "it is a FIFO, not a file"),
        ([str(tmp_path / "empty")], "holds nothing to read"),
    ):
        with pytest.raises(ValueError, match=rf"^INPUT = .* is not valid: .*{legal}.*\.$"):
            find_text_files(paths, "INPUT")


def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket is at most 108 long
        server.bind("c.txt")
        found = find_text_files([str(tmp_path)])
    assert [file.name for file in found.files] == ["a.jsonl"]
    assert found.skipped == [
        f"{tmp_path}/b.jsonl (it is a FIFO, not a file)", f"{tmp_path}/c.txt (it is a socket, not a file)",
        f"{tmp_path}/device.txt (it is a device, not a file)",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "secret" / "b.jsonl")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"paths = .* is not valid: '.*secret' can't be listed \(Permission denied\)"):
        find_text_files([str(tmp_path)])


def test_the_same_name_in_two_folders_stays_apart(tmp_path: Path):
    folders = [write(tmp_path / name / "a.jsonl").parent for name in ("x", "y")]
    assert names(*folders) == [str(folder / "a.jsonl") for folder in folders]


def test_names_that_are_not_utf8(tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as stream:
        stream.write(b"{}\n")
    (file,) = find_text_files([str(tmp_path)]).files
    assert file.name == "caf\\xe9.jsonl"
    assert pickle.loads(pickle.dumps(file)) == file
    assert os.path.getsize(file.path) == 3


def test_links_are_followed_once(tmp_path: Path):
    write(tmp_path / "in" / "a.jsonl")
    write(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "near").symlink_to(tmp_path / "in" / "far")
    found = find_text_files([str(tmp_path / "in")])
    assert [file.name for file in found.files] == ["a.jsonl", "far/b.jsonl"]
    assert [skipped.split(" (")[0] for skipped in found.skipped] == [str(tmp_path / "in" / n) for n in ("loop", "near")]
    assert f"(it is {tmp_path / 'in'}, which is read)" in found.skipped[0]


def test_a_store_is_walked_like_a_folder(tmp_path: Path):
    write(tmp_path / "in" / "b" / "x.jsonl")
    write(tmp_path / "in" / "a%20.parquet")
    local, stored = (find_text_files([prefix + str(tmp_path / "in")]).files for prefix in ("", "file://"))
    assert stored == local and len(local) == 2


# ------------------------------------------------------------------------------------------- folders of the curation


def curated(folder: Path, documents: int = 3, written: int = 3) -> Path:
    table = pa.table({"text": ["x"] * documents})
    for name in ("documents", "work/read/shards", "work/filter/shards"):
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "000000-0000.parquet")
    write(folder / "jsonl" / "000000-0000.jsonl.zst")
    write(folder / "work" / "read" / "begun.json", b"{}")
    write(folder / "report.json", json.dumps({"written": {"documents": written}}).encode())
    return folder


def test_of_a_curation_only_the_documents_are_read(tmp_path: Path):
    folder = curated(tmp_path / "many" / "one")
    curated(tmp_path / "many" / "two")
    write(tmp_path / "many" / "documents" / "plain.txt")  # of no curation, though so called
    assert names(folder) == ["documents/000000-0000.parquet"]
    assert names(folder / "documents") == ["000000-0000.parquet"]
    assert names(tmp_path / "many") == [
        "documents/plain.txt", "one/documents/000000-0000.parquet", "two/documents/000000-0000.parquet"
    ]  # fmt: skip


@pytest.mark.parametrize("below", ["", "documents", "jsonl", ".."])
def test_a_curation_that_is_not_finished_is_refused(tmp_path: Path, below: str):
    folder = curated(tmp_path / "in" / "out")
    (folder / "report.json").unlink()
    with pytest.raises(ValueError, match=r"INPUT = .*out' is not valid: it is the folder of a curation that is not "):
        find_text_files([os.path.normpath(folder / below)], "INPUT")


@pytest.mark.parametrize("work", [True, False])
def test_so_is_one_that_has_lost_documents(tmp_path: Path, work: bool):
    folder = curated(tmp_path / "out", documents=2)
    if not work:
        os.rename(folder / "work", tmp_path / "gone")
    with pytest.raises(ValueError, match="its report counts 3 documents and documents/ has 2; run tools/curate.py"):
        find_text_files([folder])
    os.remove(folder / "documents" / "000000-0000.parquet")
    if work:
        with pytest.raises(ValueError, match="documents/ has 0"):
            find_text_files([folder])


def test_so_are_damaged_and_empty_ones(tmp_path: Path):
    folder = curated(tmp_path / "a")
    (folder / "report.json").write_bytes(b'{"written"')
    with pytest.raises(ValueError, match=r"the curation's files are damaged \("):
        find_text_files([folder])
    folder = curated(tmp_path / "b")
    (folder / "documents" / "000000-0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"the curation's files are damaged \("):
        find_text_files([folder])
    with pytest.raises(ValueError, match="the curation kept no document; its report.md lists what was removed"):
        find_text_files([curated(tmp_path / "c", documents=0, written=0)])
