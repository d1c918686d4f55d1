"""Checks of config fields; each raises ValueError with one sentence: the field, its value and what is legal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(ok: bool, field: str, value: object, legal: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r} is not valid: {legal}.")


def require_positive(config: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{prefix}{field}", value, "it must be positive")


def require_literals(config: Any, prefix: str) -> None:
    """Python does not check that the value of a Literal field is one of those it lists."""
    for field, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            value = getattr(config, field)
            require(value in get_args(kind), f"{prefix}{field}", value, f"legal values are {choices(get_args(kind))}")


def choices(values: Iterable[object]) -> str:
    return ", ".join(str(v) for v in values)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def is_inside(name: str) -> bool:
    """Whether `name`, from a file that others may have written, is the path of something in the file's own folder."""
    parts = name.split("/")
    return (
        name.isprintable() and "\\" not in name and not PurePosixPath(name).is_absolute()
        and not {"", ".", ".."} & set(parts) and ":" not in parts[0]
    )  # fmt: skip


# What Orbax and TensorStore read as something else than a name: patterns, another separator, the schemes of object
# stores (`gs:/` anywhere, /gs, /s3, /az and /hf at the root), a folder that is being written.
_NOT_A_NAME = re.compile(r"[\[*?\\]|gs:(?=/)|^//|(?<=^/)(?:gs|s3|az|hf)(?=/)|\.orbax-checkpoint-tmp(?=[^/]*/)")


def check_path(field: str, path: str | Path) -> None:
    """Raises ValueError unless a checkpoint in `path`, or below it, is written to and read from this very place.

    Looks at the name alone, made absolute. A link with a plain name may lead to any place.
    """
    given = Path(path).absolute()
    # A surrogate stands for a byte that is not UTF-8, which TensorStore's paths are.
    match = re.search("[\ud800-\udfff]", str(given)) or _NOT_A_NAME.search(f"{given}/")
    require(
        match is None, field, str(path),
        f"the checkpoint library takes {match and match[0]!r} in {str(given)!r} for something else than a name; rename "
        "it or give a link with a plain name",
    )  # fmt: skip
    if ".." in given.parts:
        plain = os.path.realpath(os.path.abspath(given))
        require(
            os.path.realpath(given) == plain, field, str(path),
            f"its .. follows a link, so it means {os.path.realpath(given)!r} to the system and {plain!r} to the "
            "checkpoint library; write it without ..",
        )  # fmt: skip
