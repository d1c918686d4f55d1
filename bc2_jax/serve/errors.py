"""Errors of the API as OpenAI reports them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """Refuses a request, with an HTTP status, a sentence for people, and a code and field name for programs."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: float | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        """Seconds after which to retry."""

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Status 400, for a request that can never succeed."""
    return ApiError(400, message, code=code, param=param)


def context_too_long(prompt_tokens: int, new_tokens: int, length: int, param: str) -> ApiError:
    """A prompt that leaves no room for the requested new tokens in `length` tokens."""
    return ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, {prompt_tokens + new_tokens} "
        f"in all: the context length of this server is {length} tokens.",
        code="context_length_exceeded",
        param=param,
    )
