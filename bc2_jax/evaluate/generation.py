"""Texts that continue prompts, up to the first of several stop texts: many prompts over few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.generate import bucket
from bc2_jax.infer.refill import continue_many
from bc2_jax.infer.sampling import Settings, is_whole
from bc2_jax.sharding import parts, use_mesh_of
from bc2_jax.tokenizer import Tokenizer

CACHE_BYTES = 2 * 2**30
"""Of the KV cache on a device, at most, while there is more than one row."""
FEWEST_ROWS, MOST_ROWS = 4, 32
"""Of each device that has rows of its own, if the cache has room for them."""
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""How the benchmarks are generated: no sampling, and the model's own logits."""


class Prompt(NamedTuple):
    text: str | Sequence[int]
    """Or the token ids of one, where text can't say them: the roles of a conversation."""
    stops: Sequence[str]
    """The text ends before the first of them; none of them may be empty."""
    max_new_tokens: int


class Generated(NamedTuple):
    """What the model wrote after a prompt."""

    text: str
    """Without the stop text."""
    reason: str
    """Why it ended: "eos", "length" or "stopped"."""
    tokens: int
    """Of the text, with those of the stop text or the eos that ended it."""
    cut: int
    """Tokens of the prompt that were left out at its beginning."""


def generate_texts(
    prepared: Prepared, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_length: int,
    progress: Callable[[int, int], object] | None = None, **settings: Any,
) -> list[Generated]:  # fmt: skip
    """A text for each prompt, whose last max_length - max_new_tokens tokens are continued.

    `settings` are those of `infer.sampling.Settings`, by default GREEDY, and end of text as the model's. Raises
    ValueError for a prompt that is empty or not valid, and as `continue_many`.
    """
    ids = [_checked(number, prompt, tokenizer, max_length) for number, prompt in enumerate(prompts)]
    found: dict[int, Generated] = {}
    # One call of `continue_many` has one max_new_tokens.
    for most in sorted({prompt.max_new_tokens for prompt in prompts}):
        numbers = [number for number, prompt in enumerate(prompts) if prompt.max_new_tokens == most]
        kept = [ids[number][-(max_length - most) :] for number in numbers]
        finder = _StopFinder(tokenizer, [prompts[number].stops for number in numbers])
        done = len(found)

        def tell(so_far: str, done: int = done, count: int = len(numbers), finder: _StopFinder = finder) -> bool:
            if progress is not None:
                progress(done + min(int(so_far.split()[1]), count), len(prompts))
            return True

        continued, _ = continue_many(
            prepared, kept, Settings(**(GREEDY | settings), max_new_tokens=most, vocab_size=tokenizer.vocab_size),
            rows=_rows(prepared, max(map(len, kept)) + most, len(kept)), stops=finder, progress=tell,
        )  # fmt: skip
        for place, (number, continuation) in enumerate(zip(numbers, continued, strict=True)):
            tokens = continuation.tokens
            text, used = finder.cut(place, tokens)
            reason = continuation.reason if used is None else "stopped"
            cut = len(ids[number]) - len(kept[place])
            found[number] = Generated(text, reason, len(tokens) if used is None else used, cut)
    return [found[number] for number in range(len(prompts))]


def _checked(number: int, prompt: Prompt, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """The prompt's ids."""
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
    """How many prompts are continued at one time."""
    config, item = prepared.config, 2 if prepared.compute.dtype == "bfloat16" else 4
    with use_mesh_of(prepared.params["norm"]["weight"]):
        row = 2 * item * config.num_hidden_layers * config.hidden_size * bucket(length) // parts("attention_heads")
        cut = parts("batch")
    # Few numbers of rows, so that few programs are compiled.
    needed = max(FEWEST_ROWS, 1 << (-(-prompts // cut) - 1).bit_length())
    return cut * max(min(CACHE_BYTES // row, MOST_ROWS, needed), 1)


class _StopFinder:
    """Finds stop texts in what has been written after each prompt, for `continue_many`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[Sequence[str]]):
        self._decode, self._stops = tokenizer.decode, stops

    def __call__(self, so_far: dict[int, list[int]]) -> set[int]:
        return {place for place, ids in so_far.items() if self._find(place, self._decode(ids)) is not None}

    def cut(self, place: int, ids: Sequence[int]) -> tuple[str, int | None]:
        """The text of `ids` up to a stop text, and how many tokens there are once one is complete; None without one.

        Token by token, so that it does not matter how many more there are behind the first.
        """
        text = self._decode(ids)
        if self._find(place, text) is None:
            return text, None
        used = next(n for n in range(1, len(ids) + 1) if self._find(place, self._decode(ids[:n])) is not None)
        text = self._decode(ids[:used])
        return text[: self._find(place, text)], used

    def _find(self, place: int, text: str) -> int | None:
        """Where the first stop text begins."""
        found = [start for stop in self._stops[place] if (start := text.find(stop)) >= 0]
        return min(found, default=None)
