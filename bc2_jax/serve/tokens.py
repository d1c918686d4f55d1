"""Tokenizer endpoints, named as vLLM's: lm-eval's remote tokenizer uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bc2_jax.serve.answers import token_text
from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.errors import invalid
from bc2_jax.serve.fields import Field, Fields, flag, read_fields, text, whole
from bc2_jax.serve.prompts import ServedModel, check_ids, encode_text, fit_chat
from bc2_jax.serve.schema import chat_fields, read_messages, require_model


def tokenize_fields(limits: Limits) -> Fields:
    """Fields of /tokenize: a prompt, or the messages of a chat."""
    return {
        "model": text(), "prompt": text(), "messages": chat_fields(limits)["messages"], "max_tokens": whole(1),
        "parse_special": flag(), "return_token_strs": flag(),
        # The tokenizer adds none, so both values have the same effect.
        "add_special_tokens": flag(),
    }  # fmt: skip


DETOKENIZE_FIELDS: Fields = {
    "model": text(),
    "tokens": Field(
        lambda value: isinstance(value, list) and all(type(i) is int for i in value),
        "a list of token ids", {"type": "array", "items": {"type": "integer"}},
    ),
}  # fmt: skip


def tokenize(model: ServedModel, given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Token ids of a prompt, or of the prompt of a chat; raises ApiError."""
    values = read_fields(tokenize_fields(limits), given)
    require_model(values.get("model"), model.name)
    if ("prompt" in values) == ("messages" in values):
        raise invalid("either prompt or messages is needed, and not both.", "prompt", "missing_field")
    dropped: dict[str, int] = {}
    if "prompt" in values:
        if "max_tokens" in values:
            raise invalid("max_tokens is not valid with prompt: it belongs to messages.", "max_tokens")
        ids = encode_text(model, values["prompt"], "prompt", parse_special=values.get("parse_special", False))
    else:
        if values.get("parse_special"):
            raise invalid(
                "parse_special is not valid with messages: their text never becomes a special token.", "parse_special"
            )
        prompt, _ = fit_chat(model, read_messages(values["messages"]), values.get("max_tokens"))
        ids, dropped = prompt.ids, {"dropped_rounds": prompt.dropped_rounds}
    pieces = {"token_strs": [token_text(model.tokenizer, i) for i in ids]} if values.get("return_token_strs") else {}
    return {"count": len(ids), "max_model_len": model.length, "tokens": ids, **pieces, **dropped}


def detokenize(model: ServedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Text of token ids; special tokens have none. Raises ApiError."""
    values = read_fields(DETOKENIZE_FIELDS, given)
    require_model(values.get("model"), model.name)
    if "tokens" not in values:
        raise invalid("tokens is missing.", "tokens", "missing_field")
    check_ids(model, values["tokens"], "tokens")
    return {"prompt": model.tokenizer.decode(values["tokens"])}


def tokenizer_info(model: ServedModel) -> dict[str, Any]:
    """The tokenizer's properties. It adds nothing at the start of a text, hence no bos_token."""
    tokenizer = model.tokenizer
    return {
        "tokenizer_class": "SentencePiece",
        "bos_token": None,
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "eos_token_id": tokenizer.eos_id,
        "unk_token": tokenizer.piece(tokenizer.pad_id),
        "user_token_id": tokenizer.user_id,
        "assistant_token_id": tokenizer.assistant_id,
        "add_bos_token": False,
        "add_eos_token": False,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": model.length,
        "sha256": tokenizer.fingerprint,
    }
