"""How to read a PyTorch folder whose files leave it open, and the options of the programs that say so."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read a PyTorch folder, as far as its files do not say so, or say it wrongly."""

    position_embedding: Literal["rope", "alibi"] | None = None
    """None: as config.json says, or as its other fields tell."""
    normalize_head: bool | None = None
    """Whether the head is a NormHead. None: as config.json says, or as its other fields tell."""
    strip_prefix: str = ""
    """What wrappers have put before the tensors' names, such as "module."."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json that are not known and do not matter."""


AS_SAID = Reading()
"""As the files of the folder say."""


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `Reading`."""
    group = parser.add_argument_group("for a PyTorch folder that does not say how it is to be read, or says it wrongly")
    group.add_argument("--position-embedding", choices=("rope", "alibi"))
    group.add_argument(
        "--normalize-head", action=argparse.BooleanOptionalAction, help="the head is a NormHead, or a plain one"
    )
    group.add_argument("--strip-prefix", default="", metavar="PREFIX", help="of the tensors' names, such as module.")
    group.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY", help="a key of config.json that does not matter"
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """What the options of `add_reading_options` say."""
    return Reading(args.position_embedding, args.normalize_head, args.strip_prefix, tuple(args.ignore_key))
