"""Fields of JSON requests; one definition serves the check, its error message and the OpenAPI document."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bc2_jax.serve.errors import invalid
from bc2_jax.validation import choices, show


class Field(NamedTuple):
    """Legal values of a field; null is the same as leaving it out."""

    accepts: Callable[[Any], bool]
    legal: str  # completes "FIELD = VALUE is not valid: it must be ..."
    schema: Mapping[str, Any]  # the same as JSON Schema
    is_supported: bool = True  # false if only neutral values are accepted


Fields = Mapping[str, Field]
_FEW = 10
"""Error messages list the known names if there are at most this many."""


def is_number(value: object) -> bool:
    """Whether it is a JSON number; bools are not."""
    return type(value) in (int, float)


def whole(least: int, most: int | None = None, hint: str = "") -> Field:
    """A field for integers in a range."""
    return Field(
        lambda value: type(value) is int and value >= least and (most is None or value <= most),
        _range("a whole number", least, most, hint),
        {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most}),
    )


def number(least: float, most: float | None = None, hint: str = "", *, above: bool = False) -> Field:
    """A field for numbers in a range; `above` excludes `least` itself."""
    return Field(
        lambda value: (
            is_number(value)
            and (value > least if above else value >= least)
            and value <= (1e30 if most is None else most)
        ),
        _range("a number", least, most, hint, above),
        {"type": "number", "exclusiveMinimum" if above else "minimum": least}
        | ({} if most is None else {"maximum": most}),
    )


def _range(kind: str, least: float, most: float | None, hint: str, above: bool = False) -> str:
    start = f"above {least}" if above else f"at least {least}" if most is None else f"{least} to {most}"
    end = f" and at most {most}" if above and most is not None else ""
    return f"{kind}, {start}{end}" + (f"; {hint}" if hint else "")


def flag() -> Field:
    """A field for true or false."""
    return Field(lambda value: type(value) is bool, "true or false", {"type": "boolean"})


def text(most: int | None = None) -> Field:
    """A field for texts of at most `most` characters."""
    return Field(
        lambda value: isinstance(value, str) and (most is None or len(value) <= most),
        "a text" if most is None else f"a text of at most {most} characters",
        {"type": "string"} | ({} if most is None else {"maxLength": most}),
    )


def unsupported(*neutral: Any) -> Field:
    """An unsupported field: null and `neutral` values, which request nothing, are accepted."""
    legal = "left out, because this server does not support it"
    if neutral:
        legal += (
            f"; of its values only {choices(map(json.dumps, neutral))} {'is' if len(neutral) == 1 else 'are'} accepted"
        )
    return Field(
        lambda value: any(type(value) is type(one) and value == one for one in neutral),
        legal, {"enum": [None, *neutral]}, False,
    )  # fmt: skip


def read_fields(fields: Fields, given: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The given fields that are not null, each checked; `path` precedes their names in messages.

    Raises ApiError for an unknown field, naming the most similar known one, and for a value that is not legal.
    """
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name[:100], fields, n=1)
            legal = f"; legal are {', '.join(fields)}." if len(fields) <= _FEW else "."
            hint = f"; did you mean {near[0]!r}?" if near else legal
            raise invalid(
                f"{show(path + name)} is not a field that this server knows{hint}", path + name[:100], "unknown_field"
            )
    return {name: check(fields[name], path + name, given[name]) for name in given if given[name] is not None}


def check(field: Field, name: str, value: Any) -> Any:
    """Returns `value`; raises ApiError if it is not legal."""
    if not field.accepts(value):
        code = "invalid_value" if field.is_supported else "unsupported_value"
        raise invalid(f"{name} = {show(value)} is not valid: it must be {field.legal}.", name, code)
    return value
