"""What a client is told when a request is refused or fails: `{"error": {message, type, param, code}}`, as by OpenAI."""

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
    """Refuses a request: a status of HTTP, one sentence for people, and for programs a code and the field's name."""

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
        """Seconds after which another attempt may succeed."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of HTTP beside those of every reply."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The error of a request that can never succeed as it is: status 400."""
    return ApiError(400, message, code=code, param=param)


def context_too_long(prompt_tokens: int, new_tokens: int, length: int, param: str) -> ApiError:
    """The error of a prompt that leaves no room in `length` tokens for the new ones that were asked for."""
    return ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, {prompt_tokens + new_tokens} "
        f"in all: the context length of this server is {length} tokens.",
        code="context_length_exceeded",
        param=param,
    )
