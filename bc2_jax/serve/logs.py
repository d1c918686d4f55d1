"""One line for each request: ids, sizes and times, never prompts, answers or keys unless the operator asks for them."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Sequence

logger = logging.getLogger("bc2_jax.serve")
_LONGEST_TEXT = 2000


@dataclasses.dataclass
class Record:
    """What is known of one HTTP request; filled in on its way."""

    request_id: str
    method: str
    route: str
    """The route's own pattern, not the path that was asked for, which could be anything."""
    owner: str = ""
    user: str = ""
    status: int = 0
    outcome: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    cached_tokens: int | None = None
    started: float = dataclasses.field(default_factory=time.monotonic)

    def line(self) -> str:
        """`name=value` for all that is known; a value of the client's is quoted, so that it can't forge a line."""
        values = {
            "id": self.request_id, "key": self.owner or None, "user": ascii(self.user) if self.user else None,
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "new_tokens": self.new_tokens,
            "outcome": self.outcome or None, "seconds": f"{time.monotonic() - self.started:.3f}",
        }  # fmt: skip
        found = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        return f"{self.method} {self.route} {self.status} {found}"


def log_request(record: Record) -> None:
    """One line; none for health checks, which come every few seconds and say 503 as long as the model is loaded."""
    if record.route == "/health" or (record.route == "/metrics" and record.status == 200):
        return
    logger.info("%s", record.line())


def log_texts(request_id: str, name: str, texts: Sequence[object]) -> None:
    """What was asked or answered, for --log-prompts; shortened."""
    for text in texts:
        logger.info("%s %s %s", request_id, name, ascii(text)[:_LONGEST_TEXT])


def log_failure(request_id: str, error: BaseException, with_message: bool) -> None:
    """Where an unexpected exception came from; its message may hold a prompt, so it is logged only on request."""
    places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    message = f": {error}" if with_message else ""
    logger.error("%s failed with %s%s\n%s", request_id, type(error).__name__, message, places)
