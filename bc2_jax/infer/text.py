"""Text in, text out: generation for programs that have prompts and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.convert.hf_config import read_generation_config, read_json
from bc2_jax.convert.pretrained import FoundModel, find_model
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Settings, is_whole
from bc2_jax.infer.stream import TextStream
from bc2_jax.metadata import read_metadata
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

OnText = Callable[[int, str], object]
"""Called with the place of a prompt and text that follows on what this prompt was given before; never with none."""


class ContinuedText(NamedTuple):
    """What the model wrote after a prompt."""

    text: str
    reason: str
    """Why it ended: at an "eos", at the "length" of max_new_tokens, or "stopped" by a stop text."""


def generate_text(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> list[str]:
    """The text that continues each prompt; `settings` are those of `generate`, but for vocab_size and on_token.

    A prompt is encoded as it is: nothing is added, escapes and special tokens in it are plain text. A continuation ends
    before the first text of `stop` in it, also where tokens have other borders than that text. It holds neither eos nor
    reserved tokens, and no id is chosen that the tokenizer has no piece for. With `on_text` it is given piece by piece
    as it grows; what may still become a stop text or a character is held back until it is settled.

    Raises ValueError as `generate`, for prompts that are not texts and for stop texts that are none or empty.
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
    """`generate_text` for prompts of token ids, and why each text ended."""
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
    # What was held back may end with a stop text that the last tokens complete.
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
    """The ids of which any ends the text of the model that `path` means to `find_model`, the model's own first.

    A release may name more of them in config.json and in generation_config.json, which a checkpoint of ours keeps.
    Raises as `find_model`, and ValueError for a list of anything but ids.
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
    """The settings of `generate` that the model's generation_config.json names; `do_sample: false` is temperature 0.

    They are values that nobody has checked yet. Raises as `find_model`.
    """
    _, values = _generation_config(find_model(path))
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    settings = {name: values[name] for name in names if values.get(name) is not None}
    return settings | {"temperature": 0.0} if values.get("do_sample") is False else settings


def _generation_config(found: FoundModel) -> tuple[Path, Mapping[str, Any]]:
    """Where it is, and what it says."""
    if found.format == "pytorch":
        return found.path / "generation_config.json", read_generation_config(found.path) or {}
    return found.path, read_metadata(found.path).get("generation") or {}
