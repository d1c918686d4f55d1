from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.files import InUse, file_store, lock

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
