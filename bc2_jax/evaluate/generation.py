"""Continues many prompts up to stop texts, over few rows."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.generate import cache_slots
from bc2_jax.infer.refill import continue_many
from bc2_jax.infer.settings import Settings, is_whole
from bc2_jax.sharding import parts, use_mesh_of
from bc2_jax.tokenizer import Tokenizer

CACHE_BYTES = 2 * 2**30  # largest KV cache per device, unless one row needs more
FEWEST_ROWS, MOST_ROWS = 4, 32
"""Per batch shard, if the cache has room for them."""
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Settings of benchmarks: greedy, from raw logits."""


class Prompt(NamedTuple):
    text: str | Sequence[int]  # or token ids, for special tokens such as the roles of a conversation
    stops: Sequence[str]  # the answer ends before the first of them; none may be empty
    max_new_tokens: int


class Generated(NamedTuple):
    """A generated answer."""

    text: str  # without the stop text
    reason: str  # "eos", "length" or "stopped"
    tokens: int  # with those of the stop text or eos
    cut: int  # prompt tokens dropped at its beginning


def generate_texts(
    prepared: Prepared, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_length: int,
    progress: Callable[[int, int], object] | None = None, **settings: Any,
) -> list[Generated]:  # fmt: skip
    """Continues the last max_length - max_new_tokens tokens of each prompt.

    `settings` are fields of `infer.settings.Settings`, by default GREEDY and the model's eos. `progress` gets (texts
    done, all texts). Raises ValueError for an empty or invalid prompt, and as `continue_many`.
    """
    ids = [_checked(number, prompt, tokenizer, max_length) for number, prompt in enumerate(prompts)]
    limits = [prompt.max_new_tokens for prompt in prompts]
    kept = [of_prompt[-(max_length - limit) :] for of_prompt, limit in zip(ids, limits, strict=True)]
    finder = _StopFinder(tokenizer, [prompt.stops for prompt in prompts])

    def tell(so_far: str) -> bool:
        if progress is not None:
            progress(int(so_far.split()[1]), len(prompts))
        return True

    longest = max(len(prompt) + limit for prompt, limit in zip(kept, limits, strict=True))
    checked = Settings(**(GREEDY | settings), max_new_tokens=max(limits), vocab_size=tokenizer.vocab_size)
    continued, _ = continue_many(
        prepared, kept, checked, rows=_rows(prepared, longest, len(kept)), limits=limits, stops=finder, progress=tell
    )
    found = []
    for place, continuation in enumerate(continued):
        text, used = finder.cut(place, continuation.tokens)
        reason = continuation.reason if used is None else "stopped"
        tokens = len(continuation.tokens) if used is None else used
        found.append(Generated(text, reason, tokens, len(ids[place]) - len(kept[place])))
    return found


def _checked(number: int, prompt: Prompt, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """The prompt's ids. Raises ValueError if it is invalid."""
    name = f"prompts[{number}]"
    if not isinstance(prompt.text, Sequence) or not prompt.text:
        raise ValueError(f"{name} = {prompt.text!r} is not valid: it must be a text or token ids, and not empty.")
    if isinstance(prompt.stops, str) or not all(isinstance(stop, str) and stop for stop in prompt.stops):
        raise ValueError(f"{name} has stops = {prompt.stops!r}: it must be a list of texts, none of them empty.")
    if not is_whole(prompt.max_new_tokens) or not 0 < prompt.max_new_tokens < max_length:
        raise ValueError(
            f"{name} has max_new_tokens = {prompt.max_new_tokens!r}: it must be a whole number in 1..{max_length - 1}, "
            "so that there is room for the prompt."
        )
    return tokenizer.encode(prompt.text) if isinstance(prompt.text, str) else list(prompt.text)


def _rows(prepared: Prepared, length: int, prompts: int) -> int:
    """Concurrent prompts; few different numbers, so that few programs are compiled."""
    config, item = prepared.config, 2 if prepared.compute.dtype == "bfloat16" else 4
    with use_mesh_of(prepared.params["norm"]["weight"]):
        row = 2 * item * config.num_hidden_layers * config.hidden_size * cache_slots(length) // parts("attention_heads")
        cut = parts("batch")
    needed = max(FEWEST_ROWS, 1 << (-(-prompts // cut) - 1).bit_length())
    return cut * max(min(CACHE_BYTES // row, MOST_ROWS, needed), 1)


class _StopFinder:
    """Finds stop texts in the answers so far, for `continue_many`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[Sequence[str]]):
        self._decode, self._stops = tokenizer.decode, stops

    def __call__(self, so_far: dict[int, list[int]]) -> set[int]:
        return {place for place, ids in so_far.items() if self._find(place, self._decode(ids)) is not None}

    def cut(self, place: int, ids: Sequence[int]) -> tuple[str, int | None]:
        """(text up to a stop text, the fewest tokens that complete one; None without one)."""
        text = self._decode(ids)
        if self._find(place, text) is None:
            return text, None

        def is_complete(used: int) -> bool:
            return self._find(place, self._decode(ids[:used])) is not None

        used = bisect.bisect_left(range(len(ids)), True, lo=1, key=is_complete)
        text = self._decode(ids[:used])
        return text[: self._find(place, text)], used

    def _find(self, place: int, text: str) -> int | None:
        """Start of the first stop text."""
        found = [start for stop in self._stops[place] if (start := text.find(stop)) >= 0]
        return min(found, default=None)
