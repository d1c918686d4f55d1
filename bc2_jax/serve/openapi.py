"""The OpenAPI document, from the same tables that check requests."""

from __future__ import annotations

from typing import Any

from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.fields import Fields
from bc2_jax.serve.prompts import ServedModel
from bc2_jax.serve.schema import chat_fields, completion_fields
from bc2_jax.serve.tokens import DETOKENIZE_FIELDS, tokenize_fields

_ERRORS = {
    "400": "A value is not valid.", "401": "The API key is missing or wrong.", "404": "Not this model.",
    "413": "The body is too large.", "415": "The body is not application/json.", "429": "The queue is full.",
    "500": "The server has failed.", "503": "The server is not ready.",
}  # fmt: skip


def make_document(model: ServedModel, limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1."""
    posts = {
        "/v1/chat/completions": ("Answers a conversation.", chat_fields(limits), ["messages"]),
        "/v1/completions": ("Continues prompts.", completion_fields(limits), ["prompt"]),
        "/tokenize": ("Token ids of a text, or of a conversation.", tokenize_fields(limits), []),
        "/detokenize": ("The text of token ids.", DETOKENIZE_FIELDS, ["tokens"]),
    }
    gets = {
        "/health": "200 while requests are answered.",
        "/v1/models": "The model.",
        "/settings": "Default settings and limits.",
        "/tokenizer_info": "The tokenizer.",
        "/metrics": "Prometheus metrics.",
    }
    paths: dict[str, Any] = {path: {"post": _post(*about)} for path, about in posts.items()}
    paths |= {path: {"get": {"summary": text, "responses": _responses()}} for path, text in gets.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"bc2_jax: {model.name}", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": _error()}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(summary: str, fields: Fields, required: list[str]) -> dict[str, Any]:
    properties = {
        name: _nullable(field.schema, name in required) | {"description": f"It must be {field.legal}."}
        for name, field in fields.items()
    }
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _responses(),
    }


def _nullable(schema: Any, is_required: bool) -> dict[str, Any]:
    """null is the same as leaving a field out."""
    kind = schema.get("type")
    if kind is None or is_required:
        return dict(schema)
    return {**schema, "type": [*([kind] if isinstance(kind, str) else kind), "null"]}


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "OK"}} | {
        status: {"description": text, "content": error} for status, text in _ERRORS.items()
    }


def _error() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    return {"type": "object", "properties": {"message": {"type": "string"}, "type": text, "param": text, "code": text}}
