"""How much one request may ask for; checked before anything is allocated for it."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import require_positive


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    body_bytes: int = 1 << 20
    messages: int = 500
    prompts: int = 64
    """Of one request to /v1/completions."""
    n: int = 8
    """Choices for each prompt."""
    choices: int = 128
    """Prompts times n."""
    stop: int = 16
    """Stop texts."""
    stop_characters: int = 128
    """Of one stop text."""
    logit_bias: int = 300
    top_logprobs: int = 20
    """Of a chat."""
    logprobs: int = 5
    """The same of a completion."""
    body_seconds: float = 30.0
    """For a client to send its body."""
    unread_seconds: float = 30.0
    """For a client to read what it was sent; then its request is cancelled and the connection closed."""
    ping_seconds: float = 15.0
    """After which a silent stream sends a comment, so that nothing between takes it for dead."""

    def __post_init__(self) -> None:
        require_positive(self, "", *(field.name for field in dataclasses.fields(self)))
