"""Options for reading a PyTorch folder whose files do not say how."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read a PyTorch folder whose files do not say so, or say it wrongly."""

    position_embedding: Literal["rope", "alibi"] | None = None
    """None: from config.json, or inferred from its other fields."""
    normalize_head: bool | None = None
    """Whether the head is a NormHead. None: from config.json, or inferred from its other fields."""
    strip_prefix: str = ""  # prefix that wrappers added to tensor names, such as "module."
    ignore_keys: tuple[str, ...] = ()  # unknown keys of config.json that do not matter


AS_SAID = Reading()


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `Reading`."""
    group = parser.add_argument_group("for a PyTorch folder whose files do not say how to read it, or say it wrongly")
    group.add_argument("--position-embedding", choices=("rope", "alibi"))
    group.add_argument(
        "--normalize-head", action=argparse.BooleanOptionalAction, help="the head is a NormHead, or a plain one"
    )
    group.add_argument("--strip-prefix", default="", metavar="PREFIX", help="of the tensors' names, such as module.")
    group.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY", help="a key of config.json that does not matter"
    )


def reading_of(args: argparse.Namespace) -> Reading:
    return Reading(args.position_embedding, args.normalize_head, args.strip_prefix, tuple(args.ignore_key))
