"""Request bodies of the endpoints: JSON to a dataclass, or an ApiError that names the field.

Every field is honoured or refused by name. An unsupported field of OpenAI's API is accepted only with a neutral value;
null always means the default.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.errors import ApiError, invalid
from bc2_jax.serve.fields import Field, Fields, check, flag, is_number, number, read_fields, text, unsupported, whole
from bc2_jax.validation import show

SAMPLER = (
    "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "min_tokens",
)  # fmt: skip
"""Fields that are `infer.settings.Settings` of the same name."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role of the API -> ours."""
_UNSUPPORTED = """
audio moderation prediction prompt_cache_key prompt_cache_options prompt_cache_retention verbosity web_search_options
"""
_BIAS_KEY = re.compile("0|[1-9][0-9]{0,9}")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of chats and completions; `settings` has the fields of SAMPLER that were given."""

    settings: Mapping[str, Any]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    seed: int | None
    log_probs: int | None  # number of likely tokens to report with each token; None reports no log-probabilities
    is_stream: bool
    has_usage: bool  # whether the stream ends with the usage
    has_continuous_usage: bool
    has_token_ids: bool
    user: str


@dataclasses.dataclass(frozen=True)
class ChatBody:
    """A request to /v1/chat/completions; messages have our roles and text content."""

    model: str | None
    messages: list[dict[str, str]]
    options: Options


@dataclasses.dataclass(frozen=True)
class CompletionBody:
    """A request to /v1/completions."""

    model: str | None
    prompts: list[str] | list[list[int]]
    echo: bool
    options: Options


def decode_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises ApiError for anything else, NaN, lone surrogates and deep nesting."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise invalid(f"the body is not valid: it must be JSON in UTF-8 ({reason}).", code="invalid_json") from error
    if not isinstance(value, dict):
        raise invalid("the body is not valid: it must be a JSON object.", code="invalid_json")
    return value


def common_fields(limits: Limits) -> dict[str, Field]:
    """Fields of both endpoints."""
    return {
        "model": text(),
        "temperature": number(0, hint="0 is greedy"),
        "top_p": number(0, 1, above=True),
        "top_k": whole(0, 2**31 - 1, hint="0 keeps all"),
        "repetition_penalty": number(0, above=True, hint="1 changes nothing"),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "logit_bias": _logit_bias(limits.logit_bias),
        "min_tokens": whole(0),
        "max_tokens": whole(1),
        "n": whole(1, limits.n),
        "stop": _stop(limits.stop, limits.stop_characters),
        "stop_token_ids": Field(
            lambda value: isinstance(value, list) and len(value) <= 16 and all(type(i) is int for i in value),
            "a list of at most 16 token ids",
            {"type": "array", "items": {"type": "integer"}, "maxItems": 16},
        ),
        "ignore_eos": flag(),
        "seed": whole(0, 2**32 - 1),
        "stream": flag(),
        "stream_options": Field(lambda value: isinstance(value, dict), "an object", {"type": "object"}),
        "return_token_ids": flag(),
        "user": text(512),
        # The tokenizer adds none, so both values have the same effect.
        "add_special_tokens": flag(),
        "min_p": unsupported(0, 0.0),
        "use_beam_search": unsupported(False),
        "skip_special_tokens": unsupported(True),
        "include_stop_str_in_output": unsupported(False),
        "spaces_between_special_tokens": unsupported(True, False),
    }


def chat_fields(limits: Limits) -> dict[str, Field]:
    return {
        "messages": Field(
            lambda value: isinstance(value, list) and 1 <= len(value) <= limits.messages,
            f"a list of 1 to {limits.messages} messages",
            {"type": "array", "minItems": 1, "maxItems": limits.messages, "items": MESSAGE_SCHEMA},
        ),
        **common_fields(limits),
        "max_completion_tokens": whole(1),
        "logprobs": flag(),
        "top_logprobs": whole(0, limits.top_logprobs),
        "safety_identifier": text(512),
        "tools": unsupported([]),
        "tool_choice": unsupported("none", "auto"),
        "parallel_tool_calls": unsupported(True, False),
        "functions": unsupported([]),
        "function_call": unsupported("none", "auto"),
        "response_format": unsupported({"type": "text"}),
        "modalities": unsupported(["text"]),
        "reasoning_effort": unsupported("none"),
        "service_tier": unsupported("auto", "default"),
        "store": unsupported(False),
        "metadata": unsupported({}),
        **dict.fromkeys(_UNSUPPORTED.split(), unsupported()),
    }


def completion_fields(limits: Limits) -> dict[str, Field]:
    return {
        "prompt": Field(
            lambda value: isinstance(value, str | list),
            "a text, a list of texts, a list of token ids or a list of lists of token ids",
            {"type": ["string", "array"]},
        ),
        **common_fields(limits),
        "max_tokens": whole(0, hint="0 goes with echo"),
        "echo": flag(),
        "logprobs": whole(0, limits.logprobs),
        "best_of": whole(1, limits.n),
        "suffix": unsupported(""),
    }


_STREAM_OPTIONS: Fields = {
    "include_usage": flag(), "continuous_usage_stats": flag(), "include_obfuscation": unsupported(False),
}  # fmt: skip
_NOTHING = unsupported([])
_MESSAGE: Fields = {
    "role": Field(
        lambda value: isinstance(value, str) and value in ROLES, f"one of {', '.join(ROLES)}", {"enum": list(ROLES)}
    ),
    "content": Field(
        lambda value: isinstance(value, str | list),
        'a text, or a list of {"type": "text", "text": TEXT}',
        {"type": ["string", "array"]},
    ),
    # Clients may send back an assistant message of ours, in which these are empty.
    **dict.fromkeys(
        ("annotations", "audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls"), _NOTHING
    ),
}
MESSAGE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {name: _MESSAGE[name].schema for name in ("role", "content")},
}
_PART: Fields = {
    "type": Field(lambda value: value == "text", "'text', the only kind of content that this server reads", {}),
    "text": text(),
}


def read_chat(given: Mapping[str, Any], limits: Limits) -> ChatBody:
    """Raises ApiError."""
    values = read_fields(chat_fields(limits), given)
    messages = read_messages(_required(values, "messages"))
    if values.get("top_logprobs") is not None and not values.get("logprobs"):
        raise invalid("top_logprobs is not valid without logprobs: logprobs must be true.", "top_logprobs")
    values["max_tokens"] = values.get("max_completion_tokens", values.get("max_tokens"))
    log_probs = values.get("top_logprobs", 0) if values.get("logprobs") else None
    return ChatBody(values.get("model"), messages, _options(values, log_probs))


def read_messages(given: Sequence[Any]) -> list[dict[str, str]]:
    """Messages with our roles and text content; `align.chat` checks their order."""
    messages = []
    for i, message in enumerate(given):
        path = f"messages[{i}]"
        if not isinstance(message, dict):
            raise invalid(f"{path} = {show(message)} is not valid: it must be an object.", path)
        values = read_fields(_MESSAGE, message, f"{path}.")
        for name in ("role", "content"):
            _required(values, name, f"{path}.")
        content = values["content"]
        if isinstance(content, list):
            content = "".join(_read_part(part, f"{path}.content[{j}]") for j, part in enumerate(content))
        messages.append({"role": ROLES[values["role"]], "content": content})
    return messages


def _read_part(part: Any, path: str) -> str:
    if not isinstance(part, dict):
        raise invalid(f"{path} = {show(part)} is not valid: it must be an object.", path)
    if part.get("type") is not None:  # checked first: parts of other types have other fields
        check(_PART["type"], f"{path}.type", part["type"])
    values = read_fields(_PART, part, f"{path}.")
    _required(values, "type", f"{path}.")
    return _required(values, "text", f"{path}.")


def read_completion(given: Mapping[str, Any], limits: Limits) -> CompletionBody:
    """Raises ApiError."""
    values = read_fields(completion_fields(limits), given)
    prompts = _read_prompts(_required(values, "prompt"), limits)
    options = _options({"max_tokens": 16} | values, values.get("logprobs"))
    echo = values.get("echo", False)
    if values.get("best_of", options.n) != options.n:
        raise invalid(
            f"best_of = {values['best_of']} is not supported: it must be n = {options.n}.",
            "best_of",
            "unsupported_value",
        )
    if options.max_tokens == 0 and not echo:
        raise invalid("max_tokens = 0 is not valid: without echo it must be at least 1.", "max_tokens")
    if len(prompts) * options.n > limits.choices:
        raise invalid(f"n = {options.n} is not valid: prompts times n must be at most {limits.choices}.", "n")
    return CompletionBody(values.get("model"), prompts, echo, options)


def _read_prompts(given: str | list[Any], limits: Limits) -> list[str] | list[list[int]]:
    prompts: list[Any] = [given] if isinstance(given, str) or is_ids(given) else given
    if not 1 <= len(prompts) <= limits.prompts:
        raise invalid(f"prompt is not valid: it has {len(prompts)} prompts; 1 to {limits.prompts} are legal.", "prompt")
    kind = "texts" if isinstance(prompts[0], str) else "lists of token ids"
    for i, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) if kind == "texts" else is_ids(prompt) or prompt == []):
            raise invalid(f"prompt[{i}] = {show(prompt)} is not valid: the prompts must all be {kind}.", "prompt")
        if not prompt:
            raise invalid(f"prompt[{i}] = {prompt!r} is not valid: a prompt must not be empty.", "prompt")
    return prompts


def is_ids(value: object) -> bool:
    """Whether it is a non-empty list of integers."""
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _options(values: Mapping[str, Any], log_probs: int | None) -> Options:
    is_stream = values.get("stream", False)
    if "stream_options" in values and not is_stream:
        raise invalid("stream_options is not valid without stream: stream must be true.", "stream_options")
    stream = read_fields(_STREAM_OPTIONS, values.get("stream_options", {}), "stream_options.")
    settings = {name: values[name] for name in SAMPLER if name in values}
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(key): float(bias) for key, bias in settings["logit_bias"].items()}
    stop = values.get("stop", ())
    return Options(
        settings=settings,
        max_tokens=values.get("max_tokens"),
        n=values.get("n", 1),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(values.get("stop_token_ids", ())),
        ignore_eos=values.get("ignore_eos", False),
        seed=values.get("seed"),
        log_probs=log_probs,
        is_stream=is_stream,
        has_usage=stream.get("include_usage", False),
        has_continuous_usage=stream.get("continuous_usage_stats", False),
        has_token_ids=values.get("return_token_ids", False),
        user=values.get("safety_identifier") or values.get("user") or "",
    )


def _required(values: Mapping[str, Any], name: str, path: str = "") -> Any:
    if name not in values:
        raise invalid(f"{path}{name} is missing.", f"{path}{name}", "missing_field")
    return values[name]


def _stop(most: int, characters: int) -> Field:
    def is_stop(value: object) -> bool:
        return isinstance(value, str) and 1 <= len(value) <= characters

    return Field(
        lambda value: is_stop(value) or (isinstance(value, list) and len(value) <= most and all(map(is_stop, value))),
        f"a text, or a list of at most {most} texts, each of 1 to {characters} characters",
        {"type": ["string", "array"], "items": {"type": "string", "minLength": 1, "maxLength": characters}},
    )


def _logit_bias(most: int) -> Field:
    return Field(
        lambda value: (
            isinstance(value, dict)
            and len(value) <= most
            and all(_BIAS_KEY.fullmatch(key) for key in value)
            and all(is_number(bias) and -100 <= bias <= 100 for bias in value.values())
        ),
        f'an object of at most {most} token ids, written as "123", and biases of -100 to 100',
        {"type": "object", "maxProperties": most, "additionalProperties": {"type": "number"}},
    )


def require_model(named: str | None, served: str) -> None:
    """Raises ApiError if the request names another model than the served one."""
    if named is not None and named != served:
        message = f"model = {show(named)} is not served here: the model of this server is {served!r}."
        raise ApiError(404, message, code="model_not_found", param="model")
