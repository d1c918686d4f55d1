"""Config files: Python files that define `config()`."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import os
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from bc2_jax.validation import choices, show

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class ConfigFile(Generic[C]):
    """A config file after it was run."""

    path: Path
    config: C
    """Result of its `config()`."""
    doc: str | None
    names: dict[str, Any]
    """Its global names."""

    def prepare(self, config: C) -> C:
        """Applies the file's `prepare(config)`, if any, to a config after command line overrides."""
        if "prepare" not in self.names:
            return config
        with _named_errors(self.path):
            return _checked(f"{self.path}: prepare()", self.names["prepare"](config), type(config))

    def finish(self, config: C, workdir: Path) -> None:
        """Calls the file's `finish(config, workdir)`, if any, after the run."""
        if "finish" in self.names:
            with _named_errors(self.path):
                self.names["finish"](config, workdir)


def read_config_file(path: str | os.PathLike[str], *kinds: type[C]) -> ConfigFile[C]:
    """Runs the Python file `path` and its `config()`, which must return one of `kinds`.

    `path` may also be the name of a config that comes with the program; a file of that name goes first. Raises
    FileNotFoundError for a missing file, and ValueError, with file, line and cause, for any error in it.
    """
    path = find_config_file(path)
    with _named_errors(path):
        names = runpy.run_path(str(path))
    function = names.get("config")
    if not callable(function):
        raise ValueError(f"{path} defines no function config(); it must, and return a {_one_of(*kinds)}.")
    with _named_errors(path):
        config = _checked(f"{path}: config()", function(), *kinds)
    return ConfigFile(path, config, names.get("__doc__"), names)


def find_config_file(given: str | os.PathLike[str]) -> Path:
    """The file of a config that is given as a path, or by the name of one that comes with the program."""
    path = Path(given)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(given) in shipped:
        return shipped[str(given)]
    close = difflib.get_close_matches(path.stem, shipped, n=3)
    legal = "a Python file that defines config(), or the name of a config that comes with the program"
    hint = f"; did you mean {' or '.join(close)}?" if close else f" ({choices(shipped)})."
    raise FileNotFoundError(f"{path} is not a file: the config must be {legal}{hint}")


def shipped_configs(folder: str = "") -> dict[str, Path]:
    """The config files that come with the program, or those of a folder of them, by name: `configs/` of a checkout, in
    a wheel a folder of the package."""
    package = Path(__file__).parents[1]
    root = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    return {path.stem: path for path in sorted((root / folder).rglob("*.py"))}


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _checked(what: str, value: Any, *kinds: type[C]) -> C:
    if type(value) not in kinds:
        raise _Wrong(f"{what} returns {show(value)}; it must return a {_one_of(*kinds)}.")
    return value


def _one_of(*kinds: type) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


class _Wrong(ValueError):
    """An error that already names the file."""


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _Wrong:
        raise
    except SyntaxError as error:
        where = f"{error.filename or path}, line {error.lineno}" if error.lineno else str(path)
        raise ValueError(f"{where} is not valid Python: {error.msg}.") from error
    except Exception as error:  # whatever a user's file raises
        # The innermost line in the file itself.
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f", line {f.lineno}" for f in reversed(frames) if f.filename == str(path)), "")
        cause = " ".join(str(error).split()) or "no message"
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}{line}: {kind}{cause.rstrip('.')}.") from error
