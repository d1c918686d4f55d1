"""Whole or not there, whoever else writes, dies or puts something in the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from pathlib import Path

import pytest

from bc2_jax.convert import folder
from bc2_jax.convert.folder import check_free, written_whole
from bc2_jax.files import InUse


def nothing_foreign(_: Path) -> list[str]:
    return []


def write(target: Path, text: str = "new", overwrite: bool = False) -> None:
    with written_whole(target, overwrite, nothing_foreign) as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "sub" / "file").write_text(text)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_missing_parents_are_made_and_stay_only_with_a_result(tmp_path):
    write(tmp_path / "above" / "a")
    assert names(tmp_path / "above") == ["a"]
    with pytest.raises(KeyError), written_whole(tmp_path / "other" / "a", False, nothing_foreign):
        raise KeyError
    assert names(tmp_path) == ["above"]


def test_a_second_owner_is_refused_and_touches_nothing(tmp_path):
    with written_whole(tmp_path / "a", False, nothing_foreign) as partial:
        partial.write_text("first")
        staged = names(tmp_path)
        with pytest.raises(InUse, match=r"^The target .*/a is in use by process [0-9]+ on .*\.$"):
            write(tmp_path / "a", overwrite=True)
        assert names(tmp_path) == staged
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path) == ["a"]


def test_what_dead_owners_left_goes_and_what_others_own_stays(tmp_path):
    dead = [".a.partial-00000001", ".a.partial-00000001.orbax-checkpoint-tmp", ".a.replaced-0badcafe"]
    other = [".a.partial", ".a.partial-0000000", ".a.partial-00000001.notes", ".ab.partial-00000001", ".a.partialx"]
    other += [".a.partial-bbbbbbbb.partial-00000001", "a.partial-00000001", ".A.partial-00000001"]
    for name in dead + other:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    write(tmp_path / "a", overwrite=True)  # .a.replaced is what the dead one was replacing: it was brought back
    assert names(tmp_path) == sorted(["a", *other])
    assert (tmp_path / "a" / "sub" / "file").read_text() == "new"


def test_killed_between_the_two_renames(tmp_path):
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / ".a.replaced-12345678")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        write(tmp_path / "a")
    assert (tmp_path / "a" / "sub" / "file").read_text() == "old" and names(tmp_path) == ["a"]


def test_without_locks_nobody_cleans_up_and_only_one_gets_the_name(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".a.partial-00000001").mkdir()
    with pytest.raises(FileExistsError), written_whole(tmp_path / "a", False, nothing_foreign) as partial:
        partial.mkdir()
        write(tmp_path / "a", "second")
        assert partial.is_dir()
    assert (tmp_path / "a" / "sub" / "file").read_text() == "second"
    assert names(tmp_path) == [".a.partial-00000001", "a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_judged_again(tmp_path, overwrite):
    for appear in (Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path / "nowhere")):
        target = tmp_path / f"a{len(names(tmp_path))}"
        with pytest.raises(FileExistsError), written_whole(target, overwrite, lambda path: [path.name]) as partial:
            partial.mkdir()
            appear(target)
        assert names(tmp_path).count(target.name) == 1 and not any(n.startswith(".") for n in names(tmp_path))


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "a", "old")
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with contextlib.suppress(OSError):
        write(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "sub" / "file").read_text() == "old" and names(tmp_path) == ["a"]


def test_everything_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(folder, "sync", lambda path: synced.append((path.name, (tmp_path / "a").exists())))
    write(tmp_path / "a")
    assert {("file", False), ("sub", False), (tmp_path.name, True)} <= set(synced)


def test_links_are_never_replaced(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(FileExistsError, match="is a link and is not replaced: give the path"):
        check_free(tmp_path / "link", True, nothing_foreign)
