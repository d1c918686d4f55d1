"""Prompts for reinforcement learning: read from files, ordered by a seed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bc2_jax.align.chat import Encoder, Message, encode_prompt
from bc2_jax.align.formats import find_files, inner_records, read_prompt
from bc2_jax.data.records import Invalid, read_records
from bc2_jax.data.text_files import printable
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that the model is to continue with an answer."""

    messages: list[Message]
    """The last one is the user's, or the beginning of an answer."""
    fields: dict[str, Any]
    """All fields of its record, for reward functions."""
    where: str
    """File and line or row, from 1."""

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == "user")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The prompts of some files, and those left out."""

    prompts: list[Prompt]
    ids: list[list[int]]
    """The tokens of each, which end with 196 or with the beginning of an answer."""
    invalid: list[Invalid]
    too_long: list[Prompt]

    def describe(self) -> str:
        """One line for the log."""
        text = f"{len(self.prompts):,} prompts of {min(map(len, self.ids))} to {max(map(len, self.ids))} tokens"
        lost = [
            f"{len(found):,} {name}, the first at {found[0].where}"
            for name, found in (("are too long", self.too_long), ("can't be used", self.invalid))
            if found
        ]
        return text + (f"; left out: {'; '.join(lost)}" if lost else "")


def read_prompts(paths: Sequence[str | os.PathLike[str]], field: str = "PROMPTS") -> Iterator[Prompt | Invalid]:
    """The prompts of all files in `paths` (files or folders), in order, in any format of `align.formats`.

    An unusable record is an `Invalid` with its file and line. Raises as `find_files`, naming `field`.
    """
    for file in find_files(paths, field).files:
        for record in read_records(file.path, printable(file.path)):
            if isinstance(record, Invalid):
                yield record
                continue
            for value, where in inner_records(record.value, record.where):
                messages = read_prompt(value, where)
                if isinstance(messages, Invalid):
                    yield messages
                else:
                    yield Prompt(messages, {"prompt": value} if isinstance(value, str) else dict(value), where)


def load_prompts(
    paths: Sequence[str | os.PathLike[str]], tokenizer: Encoder, max_prompt_tokens: int, field: str = "PROMPTS"
) -> PromptSet:
    """All prompts of at most `max_prompt_tokens` tokens; longer ones are left out, not cut.

    Raises as `read_prompts`, and ValueError, naming `field`, if no prompt is left.
    """
    found: list[Prompt] = []
    ids: list[list[int]] = []
    invalid: list[Invalid] = []
    too_long: list[Prompt] = []
    for prompt in read_prompts(paths, field):
        if isinstance(prompt, Invalid):
            invalid.append(prompt)
            continue
        encoded = encode_prompt(tokenizer, prompt.messages, 0, 2**31 - 1)
        if len(encoded) > max_prompt_tokens:
            too_long.append(prompt)
        else:
            found.append(prompt)
            ids.append(encoded)
    why = [f"{len(too_long)} have more than {max_prompt_tokens} tokens"] if too_long else []
    why += [f"{sum(i.records for i in invalid)} can't be used, the first is {invalid[0]}"] if invalid else []
    shown = ", ".join(os.fspath(path) for path in paths)
    require(bool(found), field, shown, "it holds no prompt" + (f": {'; '.join(why)}" if why else ""))
    return PromptSet(found, ids, invalid, too_long)


def prompts_of(iteration: int, count: int, per_step: int, seed: int) -> list[int]:
    """Indices of the `per_step` prompts, of `count`, of an iteration (from 0).

    Each epoch has every prompt once, in its own order, drawn from the seed; an iteration may cross epochs. There is no
    state: a resumed run only needs the number of its iteration.
    """
    require(count > 0 and per_step > 0, "prompts_per_step", per_step, "it must be positive, of at least one prompt")
    places = range(iteration * per_step, (iteration + 1) * per_step)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in range(places[0] // count, places[-1] // count + 1)
    }
    return [int(orders[place // count][place % count]) for place in places]
