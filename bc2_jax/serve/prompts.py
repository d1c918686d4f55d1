"""From an API request to engine requests: token ids, settings, and dropped chat rounds."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from bc2_jax.align.chat import EncodedPrompt, fit_prompt
from bc2_jax.align.conversation import answer_ends, default_max_new_tokens
from bc2_jax.config import ModelConfig
from bc2_jax.infer.settings import MOST_EOS, Settings, is_whole
from bc2_jax.serve.errors import context_too_long, invalid
from bc2_jax.serve.requests import Request
from bc2_jax.serve.schema import SAMPLER, ChatBody, CompletionBody, Options
from bc2_jax.tokenizer import Tokenizer

COMPLETION_SETTINGS: Mapping[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "min_tokens": 0,
}  # fmt: skip
"""Default settings of completions: the model's own distribution, as in OpenAI's API."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What the HTTP side knows about the model."""

    name: str
    tokenizer: Tokenizer
    config: ModelConfig
    length: int  # most tokens of a prompt plus its continuation
    eos_ids: tuple[int, ...]
    chat_settings: Mapping[str, Any]  # default settings of chats: all of SAMPLER except logit_bias
    chat_max_tokens: int  # default for the most new tokens of a chat
    fingerprint: str  # changes with everything that may change tokens
    created: int  # start of the server, in seconds since the epoch

    @property
    def chat_ends(self) -> tuple[int, ...]:
        return tuple(answer_ends(self.eos_ids, self.config, self.tokenizer))


def chat_defaults(found: Mapping[str, Any], config: ModelConfig, length: int) -> tuple[dict[str, Any], int]:
    """Default settings of chats and their most new tokens, from a generation config (`find_chat_settings`).

    An answer gets at most 2048 tokens, or half of `length` if that is less. Raises ValueError for values that are not
    legal.
    """
    settings = {name: getattr(Settings(), name) for name in SAMPLER if name != "logit_bias"}
    settings |= {name: value for name, value in found.items() if name in settings}
    most = min(default_max_new_tokens(config), max(1, length // 2))
    named = found.get("max_new_tokens", most)
    checked = Settings(**settings, max_new_tokens=named).check(config)
    return {name: getattr(checked, name) for name in settings}, min(most, checked.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The engine requests of one API request: `n` for each prompt, in order."""

    requests: tuple[Request, ...]
    n: int
    seed: int
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...] = ()  # the text of each prompt, if it is echoed
    dropped_rounds: int | None = None  # oldest rounds of a chat that were dropped; None for a completion

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))


def ask_chat(model: ServedModel, body: ChatBody, owner: str) -> Asked:
    """Raises ApiError for an invalid conversation, one that does not fit, or settings that are not legal."""
    prompt, most = fit_chat(model, body.messages, body.options.max_tokens)
    settings = read_settings(model, body.options, model.chat_settings, model.chat_ends, most)
    ids = tuple(prompt.ids)
    requests = _requests([ids], settings, body.options, None, owner)
    return Asked(requests, body.options.n, settings.seed, (ids,), dropped_rounds=prompt.dropped_rounds)


def fit_chat(
    model: ServedModel, messages: Sequence[Mapping[str, str]], max_tokens: int | None
) -> tuple[EncodedPrompt, int]:
    """The prompt of a conversation and its most new tokens.

    Drops the oldest rounds to leave room for `max_tokens`, but never the system text or the newest round. With None
    that is the model's default, or less if those two are long. Raises ApiError if they do not fit.
    """
    name = "max_tokens"
    if max_tokens is not None and max_tokens >= model.length:
        raise invalid(
            f"{name} = {max_tokens} is not valid: prompt and answer have {model.length} tokens together.",
            name, "context_length_exceeded",
        )  # fmt: skip
    most = max_tokens or model.chat_max_tokens
    prompt = _fit_rounds(model, messages, most)
    if not prompt.cut_tokens:
        return prompt, most
    needed = len(prompt.ids) + prompt.cut_tokens
    if max_tokens is not None or needed >= model.length:
        raise context_too_long(needed, max_tokens or 1, model.length, "messages")
    most = model.length - needed
    return _fit(model, messages, most), most


def _fit_rounds(model: ServedModel, messages: Sequence[Mapping[str, str]], most: int) -> EncodedPrompt:
    """`fit_prompt`, but drops one more round if the prompt is one token (the answer's role) too long."""
    prompt = _fit(model, messages, most)
    if prompt.cut_tokens != 1 or most + 1 >= model.length:
        return prompt
    dropped = _fit(model, messages, most + 1).dropped_rounds
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system) :]
    starts = [i for i, message in enumerate(rest) if i == 0 or message["role"] == "user"]
    fewer = _fit(model, [*system, *rest[starts[dropped] :]], most)
    return fewer._replace(dropped_rounds=dropped + fewer.dropped_rounds)


def _fit(model: ServedModel, messages: Sequence[Mapping[str, str]], most: int) -> EncodedPrompt:
    try:
        return fit_prompt(model.tokenizer, messages, most, model.length)
    except ValueError as error:
        raise invalid(str(error), "messages") from error


def ask_completion(model: ServedModel, body: CompletionBody, owner: str) -> Asked:
    """Raises ApiError for ids outside the vocabulary, prompts that do not fit and settings that are not legal."""
    options = body.options
    assert options.max_tokens is not None  # the schema's default is 16
    prompts = [encode_text(model, p, "prompt") if isinstance(p, str) else list(p) for p in body.prompts]
    for ids in prompts:
        check_ids(model, ids, "prompt")
        # With max_tokens = 0 one token is still generated, which is cheaper than another program.
        if len(ids) + max(1, options.max_tokens) > model.length:
            raise context_too_long(len(ids), max(1, options.max_tokens), model.length, "prompt")
    settings = read_settings(model, options, COMPLETION_SETTINGS, model.eos_ids, max(1, options.max_tokens))
    echoes = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in body.prompts] if body.echo else []
    scored = options.log_probs if body.echo else None
    return Asked(
        _requests(prompts, settings, options, scored, owner), options.n, settings.seed, tuple(map(tuple, prompts)),
        tuple(echoes),
    )  # fmt: skip


def _requests(
    prompts: Sequence[Sequence[int]], settings: Settings, options: Options, scored: int | None, owner: str
) -> tuple[Request, ...]:
    """The choices of a prompt have places 0 to n - 1, whatever other prompts the request has."""
    return tuple(
        Request(tuple(ids), settings, place, options.log_probs, scored, owner)
        for ids in prompts
        for place in range(options.n)
    )


def read_settings(
    model: ServedModel, options: Options, defaults: Mapping[str, Any], ends: Sequence[int], max_new_tokens: int
) -> Settings:
    """Checked settings, with a random seed if none is given; raises ApiError."""
    ends = [*(() if options.ignore_eos else ends), *options.stop_token_ids]
    check_ids(model, options.stop_token_ids, "stop_token_ids")
    check_ids(model, list(options.settings.get("logit_bias", ())), "logit_bias")
    if len(set(ends)) > MOST_EOS:
        most = MOST_EOS - (len(ends) - len(options.stop_token_ids))
        raise invalid(
            f"stop_token_ids is not valid: it may have at most {most} ids in addition to the model's.", "stop_token_ids"
        )
    values = {**defaults, **options.settings}
    if values["min_tokens"] > max_new_tokens:
        least = values["min_tokens"]
        raise invalid(
            f"min_tokens = {least} is not valid: it must be at most max_tokens = {max_new_tokens}.", "min_tokens"
        )
    try:
        return Settings(
            **values,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            eos_token_id=list(dict.fromkeys(ends)),
            vocab_size=model.tokenizer.vocab_size,
        ).check(model.config)
    except ValueError as error:  # a value that overflows fp32
        raise invalid(str(error), str(error).partition(" ")[0]) from error


def encode_text(model: ServedModel, text: str, name: str, *, parse_special: bool = False) -> list[int]:
    """Token ids of a text; raises ApiError if it is not valid."""
    try:
        return model.tokenizer.encode(text, parse_special=parse_special)
    except ValueError as error:
        raise invalid(f"{name} is not valid: {error}", name) from error


def check_ids(model: ServedModel, ids: Sequence[int], name: str) -> None:
    """Raises ApiError for an id outside the vocabulary."""
    V = model.config.vocab_size
    for i in ids:
        if not (is_whole(i) and 0 <= i < V):
            raise invalid(f"{name} has the token id {i}, which is not valid: it must be in 0..{V - 1}.", name)
