"""Checks of config fields; each raises ValueError with one sentence: the field, its value and what is legal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
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
