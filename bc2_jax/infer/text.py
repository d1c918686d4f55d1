"""Generation with text in and out, streamed text with stop strings, and a model's generation settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.convert.hf_config import read_generation_config, read_json
from bc2_jax.convert.pretrained import FoundModel, find_model
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Settings, is_whole
from bc2_jax.metadata import read_metadata
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

# A UTF-8 character has at most 4 bytes, so earlier bytes cannot belong to a later character.
_LONGEST_CHARACTER = 4
# Number of tokens without a complete last character after which a character boundary is searched inside them.
_LONGEST_OPEN = 16
OnText = Callable[[int, str], object]
"""Called with a prompt's index and the next piece of its continuation, never empty."""


class ContinuedText(NamedTuple):
    """The text that continues a prompt."""

    text: str
    reason: str
    """"eos", "length" (max_new_tokens reached) or "stopped" (by a stop text)."""


def generate_text(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> list[str]:
    """Generates text that continues each prompt. `settings` are those of `generate` except vocab_size and on_token.

    A prompt is encoded as it is: nothing is added, and escapes and special tokens in it are plain text. A continuation
    ends before the first of the `stop` texts in it, wherever tokens have their boundaries. It contains no eos or
    reserved tokens, and ids without a piece in the tokenizer are never sampled. `on_text` receives each continuation
    piece by piece; an end that may still become a stop text or a character is held back until that is settled.

    Raises ValueError as `generate`, and for prompts or stop texts that are not texts and for empty stop texts.
    """
    stop = _stop_texts(stop)
    ids = tokenizer.encode_batch(_texts("prompts", prompts))
    found = continue_text(model, tokenizer, ids, stop=stop, on_text=on_text, **settings)
    return [continued.text for continued in found]


def continue_text(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> list[ContinuedText]:
    """`generate_text` for prompts of token ids; also returns why each text ended."""
    stop = _stop_texts(stop)
    checked = Settings(**settings, vocab_size=tokenizer.vocab_size)
    if not stop and on_text is None:
        found = continue_prompts(model, prompts, checked)
        written = [c.tokens[:-1] if c.reason == "eos" else c.tokens for c in found]
        return [ContinuedText(tokenizer.decode(ids), c.reason) for ids, c in zip(written, found, strict=True)]
    streams = [TextStream(tokenizer.decode, stop) for _ in prompts]
    texts = [""] * len(prompts)

    def give(place: int, text: str) -> None:
        texts[place] += text
        if text and on_text is not None:
            on_text(place, text)

    def on_token(step: int, tokens: list[int | None]) -> list[bool]:
        for place, token in enumerate(tokens):
            if token is not None:
                give(place, streams[place].add(token))
        return [stream.stopped for stream in streams]

    found = continue_prompts(model, prompts, checked, on_token=on_token)
    for place, stream in enumerate(streams):
        give(place, stream.finish())
    # The last tokens may complete a stop text in the text that was held back.
    reasons = ["stopped" if stream.stopped else c.reason for stream, c in zip(streams, found, strict=True)]
    return [ContinuedText(text, reason) for text, reason in zip(texts, reasons, strict=True)]


def _stop_texts(stop: str | Sequence[str]) -> list[str]:
    found = _texts("stop", [stop] if isinstance(stop, str) else stop)
    if "" in found:
        raise ValueError(f"stop = {stop!r} is not valid: a stop text must not be empty.")
    return found


def _texts(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} = {values!r} is not valid: it must be a list of texts.")
    found = list(values)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] = {text!r} is not valid: it must be a text.")
    return found


def find_eos_ids(path: str | Path) -> list[int]:
    """Ids that end the text of the model at `path` (as for `find_model`); the model's own eos first.

    A release may name more ids in config.json and generation_config.json; a checkpoint keeps the latter. Raises as
    `find_model`, and ValueError for a list of anything but ids.
    """
    found = find_model(path)
    places = dict([_generation_config(found)])
    if found.format == "pytorch":
        places[found.path / "config.json"] = read_json(found.path / "config.json")
    ids = [found.config.eos_token_id]
    for place, values in places.items():
        named = values.get("eos_token_id")
        several = named if isinstance(named, list) else [] if named is None else [named]
        require(all(map(is_whole, several)), f"{place}: eos_token_id", named, "it must be an id or a list of ids")
        ids += several
    return list(dict.fromkeys(ids))


def find_chat_settings(path: str | Path) -> dict[str, Any]:
    """Settings of `generate` in the model's generation_config.json, unchecked; `do_sample: false` becomes temperature
    0.

    Raises as `find_model`.
    """
    _, values = _generation_config(find_model(path))
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    settings = {name: values[name] for name in names if values.get(name) is not None}
    return settings | {"temperature": 0.0} if values.get("do_sample") is False else settings


def _generation_config(found: FoundModel) -> tuple[Path, Mapping[str, Any]]:
    """(its path, its content)."""
    if found.format == "pytorch":
        return found.path / "generation_config.json", read_generation_config(found.path) or {}
    return found.path, read_metadata(found.path).get("generation") or {}


class TextStream:
    """Turns tokens that arrive one by one into pieces of text that never need to be taken back.

    A character outside the vocabulary arrives as up to four byte tokens; until it is complete, `decode` (ids -> text)
    ends in U+FFFD. Such an end is held back until the next tokens or `finish` settle it; so is an end that may begin a
    stop string. The text ends before the first complete stop string, wherever tokens have their boundaries; of several
    that end at the same character the longest counts.

    The work per token does not grow with the text: tokens are decoded from the last boundary at which a character was
    complete. That equals decoding all of them, because no piece except bytes depends on its neighbours.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._open: list[int] = []
        """Tokens whose text may still change."""
        self._settled = ""
        """The text before `_open`, from the first character not yet returned."""
        self._given = 0
        """Characters of `_settled` plus the text of `_open` that were returned."""
        self.stopped = False
        """Whether a stop string was found; what follows it is dropped."""

    def add(self, token_id: int) -> str:
        """Text that is new and final; empty while a character or stop string may be incomplete."""
        self._open.append(token_id)
        text = self._decode(self._open)
        whole = text.rstrip("\ufffd")
        if whole == text:
            self._settle(text, len(self._open))
            whole = ""
        elif len(self._open) >= _LONGEST_OPEN:
            whole = whole[self._cut_open(text) :]
        return self._take(self._settled + whole, is_last=False)

    def finish(self) -> str:
        self._settle(self._decode(self._open), len(self._open))
        return self._take(self._settled, is_last=True)

    def _settle(self, text: str, count: int) -> None:
        self._settled += text
        del self._open[:count]

    def _cut_open(self, text: str) -> int:
        """Settles the text before the longest character that may be incomplete, if that is a character boundary.

        Returns how many characters that was.
        """
        last = len(self._open) - _LONGEST_CHARACTER
        for count in range(last, last - _LONGEST_CHARACTER, -1):
            before = self._decode(self._open[:count])
            if before + self._decode(self._open[count:]) == text:
                self._settle(before, count)
                return len(before)
        return 0

    def _take(self, text: str, is_last: bool) -> str:
        """The part of `text` that is final and was not returned yet."""
        if self.stopped:
            return ""
        end = self._find_stop(text)
        if end is None:
            end = len(text) if is_last else len(text) - self._held_back(text)
        new = text[self._given : end]
        self._given = max(self._given, end)
        dropped = min(self._given, len(self._settled))
        self._settled = self._settled[dropped:]
        self._given -= dropped
        return new

    def _find_stop(self, text: str) -> int | None:
        """Where the text ends if a stop string is complete; text already returned holds no start of one."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop, self._given)) >= 0]
        if not found:
            return None
        self.stopped = True
        return min(found)[1]

    def _held_back(self, text: str) -> int:
        """Number of characters at the end with which a stop string may begin."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(text) - self._given), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
