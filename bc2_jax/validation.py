"""Checks of config fields; each raises ValueError with one sentence: the field, its value and what is legal."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Lists of divisors are complete below the square of this; more would take too long.
_LAST_DIVISOR_TRIED = 100_000
_MOST_CHOICES = 60
_LONGEST_VALUE = 300
_KINDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
}


def require(ok: bool, field: str, value: object, legal: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {show(value)} is not valid: {legal}.")


def show(value: object) -> str:
    """repr(value) on one line; long values are shortened in the middle. Python refuses to print integers of thousands
    of digits."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except ValueError:
        return "a number of thousands of digits"
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE // 2]}...{text[-_LONGEST_VALUE // 2 :]}"


def require_types(config: Any, prefix: str) -> None:
    """Requires a value of the declared type for each field declared int, float, bool or str.

    A bool is not a number, an integer is also a float, and a float must be finite.
    """
    for field, declared in get_type_hints(type(config)).items():
        if declared not in _KINDS:
            continue
        value = getattr(config, field)
        kind, name = _KINDS[declared]
        is_right = isinstance(value, kind) and (declared is bool or not isinstance(value, bool))
        require(is_right, f"{prefix}{field}", value, f"it must be {name}")
        if declared is float:
            require(_is_finite(value), f"{prefix}{field}", value, "it must be finite")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def require_positive(config: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{prefix}{field}", value, "it must be positive")


def require_at_most(config: Any, prefix: str, **largest: int) -> None:
    for field, limit in largest.items():
        value = getattr(config, field)
        require(value <= limit, f"{prefix}{field}", value, f"it must be at most {limit}")


def require_literals(config: Any, prefix: str) -> None:
    """Requires one of the listed values for each Literal field."""
    for field, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            value = getattr(config, field)
            require(value in get_args(kind), f"{prefix}{field}", value, f"legal values are {choices(get_args(kind))}")


def check_fields(config: Any, prefix: str, positive: Iterable[str] = (), not_negative: Iterable[str] = ()) -> None:
    """Checks the fields of a config dataclass: declared types and literals, then signs."""
    require_literals(config, prefix)
    require_types(config, prefix)
    require_positive(config, prefix, *positive)
    for field in not_negative:
        require(getattr(config, field) >= 0, f"{prefix}{field}", getattr(config, field), "it must be at least 0")


def choices(values: Iterable[object]) -> str:
    """The values, comma-separated; of many only the first and last."""
    texts = [str(value) for value in values]
    if len(texts) > _MOST_CHOICES:
        texts[_MOST_CHOICES // 2 : -_MOST_CHOICES // 2] = ["..."]
    return ", ".join(texts)


def join_some(items: Iterable[str], limit: int = 20) -> str:
    """The first items, and the number of further ones."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join(items[:limit] + more)


def divisors(n: int) -> list[int]:
    """Ascending; above 10^10 only divisors up to 10^5 and their cofactors."""
    small = [d for d in range(1, min(math.isqrt(n), _LAST_DIVISOR_TRIED) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def is_inside(name: str) -> bool:
    """Whether `name`, from an untrusted file, is the path of something in that file's folder."""
    parts = name.split("/")
    return (
        name.isprintable() and "\\" not in name and not PurePosixPath(name).is_absolute()
        and not {"", ".", ".."} & set(parts) and ":" not in parts[0]
    )  # fmt: skip


def require_local(field: str, path: str) -> None:
    """Raises ValueError for a URL such as gs://BUCKET/RUN where only a path of a file system will do."""
    require(
        re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is None, field, path,
        "it must be a path of a file system. An object store has no locks, renames, appends or mapped files, which "
        "runs and models need: mount the bucket (Cloud Storage FUSE, Filestore), or copy from and to it "
        "(docs/pods.md, Object stores)",
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
