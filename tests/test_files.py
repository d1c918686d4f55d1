from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bc2_jax.files import InUse, append_lines, file_sha256, file_store, fingerprint, lock, replaced

HOLD = """
import sys, time
from pathlib import Path
from bc2_jax.files import lock
with lock(Path(sys.argv[1]), "The place"):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from bc2_jax.files import InUse, lock
folder, done = Path(sys.argv[1]), 0
while done < 40:
    try:
        with lock(folder / "new" / ".lock", "The place"):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
            done += 1
    except InUse:
        pass
"""


def start(program: str, *args: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_a_second_owner_is_refused_and_the_first_keeps_it(tmp_path: Path):
    path = tmp_path / "run" / ".lock"
    with lock(path, "The place"):
        for _ in range(2):
            sentence = f"^The place is in use by process {os.getpid()} on .*; wait .*stop it.$"
            with pytest.raises(InUse, match=sentence), lock(path, "The place"):
                pass
        assert path.exists()
    with lock(path, "The place"):
        pass


def test_a_dead_owner_releases_it(tmp_path: Path):
    process = start(HOLD, tmp_path / ".lock")
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(InUse, match=f"process {process.pid} "), lock(tmp_path / ".lock", "The place"):
        pass
    process.kill()
    process.wait()
    with lock(tmp_path / ".lock", "The place"):
        pass


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "half a name"])
def test_an_owner_that_has_not_yet_written_its_name_is_waited_for(tmp_path: Path, before: str):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    text = {"nothing": "", "a dead owner": name.replace(str(os.getpid()), str(dead.pid)), "half a name": name[:9]}
    path = tmp_path / "lock"
    path.write_text(text[before])
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writes = threading.Timer(0.1, lambda: path.write_text(name))
        writes.start()
        with pytest.raises(InUse, match=f"^run is in use by process {os.getpid()} on "), lock(path, "run"):
            pass
        writes.join()


def test_an_owner_that_never_writes_its_name_is_another_process(tmp_path: Path):
    with (tmp_path / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="^run is in use by another process; "), lock(tmp_path / "lock", "run"):
            pass


def test_one_owner_at_a_time_though_each_removes_the_file_and_its_folder(tmp_path: Path):
    (tmp_path / "count").write_text("0")
    processes = [start(COUNT, tmp_path) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "160"


@pytest.mark.parametrize("before", [(), ("a",), ("a", "a/b"), ("a", "a/b", "a/b/other")])
def test_only_the_folders_that_it_made_are_removed_and_only_empty_ones(tmp_path: Path, before: tuple[str, ...]):
    for name in before:
        (tmp_path / name).mkdir()
    with lock(tmp_path / "a" / "b" / ".lock", "The place"):
        pass
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == list(before)
    with lock(tmp_path / "a" / "b" / ".lock", "The place"):
        (tmp_path / "a" / "b" / "result").touch()
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(
        {"result", *(name.rpartition("/")[2] for name in before if name.count("/") == 2)}
    )


def test_a_folder_is_no_url(tmp_path: Path):
    import tensorstore as ts

    folder = tmp_path / "a%20b #?[1]|"
    folder.mkdir()
    (folder / "x").write_bytes(b"there")
    assert ts.KvStore.open(file_store(folder)).result().read("x").result().value == b"there"


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"shared": True}], ids=str)
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, options: dict[str, bool]):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(KeyError), replaced(path, **options) as partial:
        partial.write_text("ha")
        raise KeyError
    assert path.read_text() == "old"
    with replaced(path, **options) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_processes_that_write_a_shared_file_at_once_use_different_names(tmp_path: Path):
    with replaced(tmp_path / "a", shared=True) as one, replaced(tmp_path / "a", shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_lines_are_appended_after_the_last_whole_one(tmp_path: Path):
    path = tmp_path / "lines"
    append_lines(path, b"a\n")
    append_lines(path, b"b\nc\n")
    with path.open("ab") as file:
        file.write(b"cut o")
    append_lines(path, b"d\n")
    assert path.read_bytes() == b"a\nb\nc\nd\n"


def test_fingerprints_of_equal_values_are_equal(tmp_path: Path):
    assert fingerprint({"a": 1, "b": tmp_path}) == fingerprint({"b": str(tmp_path), "a": 1})
    assert fingerprint({"a": 1, "b": 2}, sort_keys=False) != fingerprint({"b": 2, "a": 1}, sort_keys=False)
    assert fingerprint([]) == hashlib.sha256(b"[]").hexdigest()
    (tmp_path / "x").write_bytes(b"[]")
    assert file_sha256(tmp_path / "x") == fingerprint([])
