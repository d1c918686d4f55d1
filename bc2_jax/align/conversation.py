"""Chat with a model: a single answer, or a conversation of several turns."""

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
    """The model's answer to a conversation; `settings` as in `generate_text`.

    The prompt is that of `align.chat.encode_prompt`; if the last message is an answer, it is continued. max_new_tokens
    is by default 2048, or half of model_max_length if that is less. Role tokens also end the answer. Raises ValueError
    as `encode_prompt` and `generate_text`."""
    return answer(model, tokenizer, messages, on_text=on_text, **settings).text


def answer(
    model: Baichuan2 | Prepared,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    on_text: OnText | None = None,
    **settings: Any,
) -> Answer:
    """`chat`, with why the answer ended and what had no room."""
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
    """2048 as released, or half of model_max_length if that is less."""
    return min(Settings.max_new_tokens, max(1, config.model_max_length // 2))


def answer_ends(eos_token_id: int | Sequence[int] | None, config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer: eos and the role tokens, after which another message begins."""
    given: Any = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [given] if is_whole(given) else list(given)
    return list(dict.fromkeys([*ends, tokenizer.user_id, tokenizer.assistant_id]))


class Conversation(Dialogue):
    """A conversation with one model, which is prepared only once. `settings` are those of `chat`; `ask` raises as
    `chat`."""

    def __init__(self, model: Baichuan2 | Prepared, tokenizer: Tokenizer, system: str = "", **settings: Any) -> None:
        prepared = engine.prepare(model) if isinstance(model, Baichuan2) else model

        def answers(messages: Sequence[Message], on_text: OnText, settings: Mapping[str, Any]) -> Answer:
            return answer(prepared, tokenizer, messages, on_text=on_text, **settings)

        def check(settings: Mapping[str, Any]) -> Settings:
            return _without_stop(settings).check(prepared.config)

        super().__init__(answers, system, check=check, **{"seed": Settings.seed, **settings})


def _without_stop(settings: Mapping[str, Any]) -> Settings:
    """The settings of `generate`, which has no stop texts."""
    return Settings(**{name: value for name, value in settings.items() if name != "stop"})
