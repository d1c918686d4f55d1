"""Chatting with a model: a single answer, or a conversation of several turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bc2_jax.align.chat import Message, fit_prompt
from bc2_jax.align.dialogue import Answer, Dialogue, OnText
from bc2_jax.config import ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.settings import Settings, is_whole
from bc2_jax.infer.text import continue_text
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer


def chat(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    on_text: OnText | None = None,
    **settings: Any,
) -> str:
    """The model's answer to a conversation; `settings` are those of `generate_text`.

    The prompt is that of `align.chat.encode_prompt`; an answer that is the last message is continued. By default there
    is room for 2048 new tokens, or for half of model_max_length if that is less. The answer also ends at a role token:
    eos_token_id, the config's by default, has them beside it. Raises ValueError as `encode_prompt` and `generate_text`.
    """
    return answer(model, tokenizer, messages, on_text=on_text, **settings).text


def answer(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    on_text: OnText | None = None,
    **settings: Any,
) -> Answer:
    """`chat`, and all that is known of the answer."""
    config = model.config
    settings.setdefault("max_new_tokens", default_max_new_tokens(config))
    settings["eos_token_id"] = answer_ends(settings.get("eos_token_id"), config, tokenizer)
    limit = _without_stop(settings).check(config).max_new_tokens
    longest = model.max_length if isinstance(model, Prepared) else config.model_max_length
    prompt = fit_prompt(tokenizer, messages, limit, longest)
    give = None if on_text is None else lambda place, text: on_text(text)
    [found] = continue_text(model, tokenizer, [prompt.ids], on_text=give, **settings)
    return Answer(found.text, found.reason, prompt.dropped_rounds, prompt.cut_tokens)


def default_max_new_tokens(config: ModelConfig) -> int:
    """The released number, or half of what the model has room for."""
    return min(Settings.max_new_tokens, max(1, config.model_max_length // 2))


def answer_ends(eos_token_id: int | Sequence[int] | None, config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """The ids at which an answer ends: eos, and the roles, because what follows a role token is another message."""
    given: Any = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [given] if is_whole(given) else list(given)
    return list(dict.fromkeys([*ends, tokenizer.user_id, tokenizer.assistant_id]))


class Conversation(Dialogue):
    """A conversation with one model, which is prepared once; its messages are what was said so far.

    `settings` are those of `chat`, for every answer; `ask` raises as it does.
    """

    def __init__(self, model: Baichuan2 | Prepared, tokenizer: Tokenizer, system: str = "", **settings: Any) -> None:
        prepared = engine.prepare(model) if isinstance(model, Baichuan2) else model

        def answers(messages: Sequence[Message], on_text: OnText, settings: Mapping[str, Any]) -> Answer:
            return answer(prepared, tokenizer, messages, on_text=on_text, **settings)

        def check(settings: Mapping[str, Any]) -> Settings:
            return _without_stop(settings).check(prepared.config)

        super().__init__(answers, system, check=check, **{"seed": Settings.seed, **settings})


def _without_stop(settings: Mapping[str, Any]) -> Settings:
    """The settings of `generate` among those of `generate_text`."""
    return Settings(**{name: value for name, value in settings.items() if name != "stop"})
