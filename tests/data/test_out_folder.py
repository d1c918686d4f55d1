"""A folder of rows has one writer, and nothing but rows is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from bc2_jax.data.out_folder import own_folder
from bc2_jax.files import InUse


def make(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(folder.name)
    return folder


@pytest.mark.parametrize("names", [(), ("manifest.json",), ("corpus.json", "problems.txt"), ("manifest.json", "a")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_replaced(tmp_path: Path, names: tuple[str, ...], overwrite: bool) -> None:
    out, new = make(tmp_path / "out", *names), make(tmp_path / "new", "manifest.json")
    if overwrite and "a" not in names:
        with own_folder(out, overwrite) as publish:
            publish(new)
        assert [path.read_text() for path in out.iterdir()] == ["new"]
    else:
        with pytest.raises(FileExistsError, match=f"^out_dir = '{out}' is not valid: it "), own_folder(out, overwrite):
            pass
        assert sorted(path.name for path in out.iterdir()) == sorted(names) and new.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "new"}


def test_what_appears_or_changes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out, new = tmp_path / "out", make(tmp_path / "new", "manifest.json")
    with pytest.raises(FileExistsError, match="choose another or pass overwrite"), own_folder(out, False) as publish:
        make(out)
        publish(new)
    with pytest.raises(FileExistsError, match="it also has notes"), own_folder(out, True) as publish:
        (out / "manifest.json").touch()
        (out / "notes").touch()
        publish(new)
    assert (out / "notes").exists() and new.exists()


def test_there_is_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "below" / "out"
    with own_folder(out, False), pytest.raises(InUse, match=f"^out_dir = '{out}' is in use by"), own_folder(out, True):
        pass
    assert not list(tmp_path.iterdir())
