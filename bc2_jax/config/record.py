"""Configs from JSON, as runs record them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def from_record(kind: type[Config], record: dict[str, Any], prefix: str = "") -> Config:
    """Inverse of `dataclasses.asdict`, also after JSON; missing fields get their defaults. Raises ValueError for
    unknown fields and illegal values."""
    hints = get_type_hints(kind)
    for name in record:
        if name not in hints:
            raise ValueError(f"{prefix}{name} = {record[name]!r} is not valid: this version has no such field.")
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}.") for name, value in record.items()})


def _value(kind: Any, value: Any, prefix: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_record(kind, value, prefix)  # type: ignore[arg-type]  # any dataclass
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(get_args(kind)[0], item, prefix) for item in value)
    return value
