"""Client of a chat server: tools/serve.py, or any other with OpenAI's chat completions API."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from bc2_jax.align.chat import Message
from bc2_jax.align.dialogue import Answer, OnText
from bc2_jax.validation import require

CONNECT_S = 10.0
SILENT_S = 120.0
"""Longest silence of a server; tools/serve.py sends a comment every 15 s while a request waits."""
TRIES = 6
"""Attempts while the server is busy."""
MOST_WAIT_S = 60
MOST_EVENT_BYTES = 2**24
_MOST_ERROR_BYTES = 2**16
_FIELDS = {"max_new_tokens": "max_tokens"}
"""Our settings -> names in the API, where they differ."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class ServerError(OSError):
    """A request failed; the message is one sentence."""


class ChatServer:
    """A server at `url`, with or without /v1 at the end; `answer` is an `Answers`. `say` gets remarks while the user
    waits. Raises ValueError if the URL is not http or https."""

    def __init__(self, url: str, key: str | None = None, say: Callable[[str], object] = lambda remark: None) -> None:
        self.url, self._key, self._say = url, key, say
        self._parts = _split_url(url)
        self._path = self._parts.path.rstrip("/").removesuffix("/v1")
        self.model: str | None = None
        """Name of the model; None if the server has no list of models."""

    def find_model(self) -> None:
        """Gets the name of the server's first model. Raises ServerError if that fails."""
        with self._send("GET", "/v1/models") as response:
            if response.status == 404:
                return
            if response.status != 200:
                raise self._refusal(response)
            try:
                self.model = str(json.loads(self._read_all(response))["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise ServerError(f"{self.url} is not a server with OpenAI's API: it has no list of models.") from error

    def answer(self, messages: Sequence[Message], on_text: OnText, settings: Mapping[str, Any]) -> Answer:
        """Streams the answer to a conversation; missing settings are the server's.

        The connection is always closed, also on KeyboardInterrupt, which stops the server's generation. A busy server
        is asked again after the time that it names. Raises ServerError."""
        given = {_FIELDS.get(name, name): value for name, value in settings.items() if value not in (None, [], ())}
        named = {} if self.model is None else {"model": self.model}
        body = {**named, "messages": [dict(message) for message in messages], "stream": True, **given}
        for attempt in range(1, TRIES + 1):
            with self._send("POST", "/v1/chat/completions", body) as response:
                if response.status == 200:
                    return self._read_answer(response, on_text)
                refusal, wait_s = self._refusal(response), _retry_after(response)
                if response.status != 429 or attempt == TRIES:
                    raise refusal
            self._say(f"the server is busy; trying again in {wait_s} s")
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    # -------------------------------------------------------------------------------------------------- the connection

    @contextlib.contextmanager
    def _send(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        parts = self._parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        headers = {"Accept": "text/event-stream, application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        response = None
        try:
            try:
                connection.connect()
                connection.sock.settimeout(SILENT_S)
                connection.request(method, self._path + path, content, headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                raise ServerError(f"the server at {self.url} can't be reached: {_why(error)}.") from error
            yield response
        finally:
            if response is not None:
                response.close()
            connection.close()

    def _read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """The next bytes, up to `most`; empty at the end."""
        try:
            return response.read1(most)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"the server at {self.url} broke off in the middle of the reply: {_why(error)}."
            ) from error

    def _read_all(self, response: http.client.HTTPResponse) -> bytes:
        """The body of an error or of a list of models, up to a limit."""
        content = b""
        while len(content) < _MOST_ERROR_BYTES and (piece := self._read(response, _MOST_ERROR_BYTES)):
            content += piece
        return content

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        """The error of a status other than 200."""
        try:
            message = str(json.loads(self._read_all(response))["error"]["message"])
        except (ValueError, LookupError, TypeError, ServerError):
            message = response.reason or "it does not say why"
        message = message.strip().removesuffix(".")
        if response.status == 401:
            return ServerError(f"the server at {self.url} wants an API key (--api-key-file or BC2_API_KEY): {message}.")
        return ServerError(f"the server at {self.url} refuses ({response.status}): {message}.")

    # ------------------------------------------------------------------------------------------------------ the answer

    def _read_answer(self, response: http.client.HTTPResponse, on_text: OnText) -> Answer:
        said, reason = [], None
        for chunk in self._chunks(response):
            text, ended = self._read_chunk(chunk)
            if text:
                said.append(text)
                on_text(text)
            reason = ended or reason
        if reason is None:
            raise ServerError(f"the server at {self.url} broke off in the middle of the answer.")
        dropped = response.headers.get("X-Dropped-Rounds", "")
        rounds = int(dropped) if dropped.isascii() and dropped.isdigit() else 0
        return Answer("".join(said), "length" if reason == "length" else "eos", rounds, 0)

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[str]:
        """The data of the events of a stream up to [DONE]."""
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            raise ServerError(f"the server at {self.url} does not stream its answers: it sends {kind}.")
        reader = EventReader()
        while piece := self._read(response, 2**16):
            try:
                events = reader.add(piece)
            except ValueError as error:
                raise ServerError(f"the server at {self.url} sends unreadable events: {error}.") from error
            for event in events:
                if event == "[DONE]":
                    return
                yield event

    def _read_chunk(self, chunk: str) -> tuple[str, str | None]:
        """The text of a chunk, and the finish reason, if any."""
        try:
            values = json.loads(chunk)
            if "error" in values:
                message = str(values["error"]["message"]).removesuffix(".")
                raise ServerError(f"the server at {self.url} failed in the middle of the answer: {message}.")
            if not values.get("choices"):
                return "", None
            [choice] = values["choices"]
            text = choice["delta"].get("content") or ""
            return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"the server at {self.url} sends a chunk that is not of a chat.") from error


def _split_url(url: str) -> SplitResult:
    legal = "it must be http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number
        ok = False
    require(ok and not (parts.query or parts.fragment or "@" in parts.netloc), "--url", url, legal)
    return parts


def _retry_after(response: http.client.HTTPResponse) -> int:
    """Seconds; 1 by default."""
    given = response.headers.get("Retry-After", "")
    return max(1, min(int(given), MOST_WAIT_S)) if given.isascii() and given.isdigit() else 1


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class EventReader:
    """Parser of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), of which it keeps
    the data only; bytes may be cut anywhere."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._is_after_return = False

    def add(self, piece: bytes) -> list[str]:
        """The data of the events that end in this piece. Raises ValueError for bytes that are not UTF-8, and for an
        event of more than MOST_EVENT_BYTES."""
        if self._is_after_return and piece:  # rest of a line end
            piece = piece.removeprefix(b"\n")
            self._is_after_return = False
        self._is_after_return |= piece.endswith(b"\r")
        events = []
        *lines, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            event = self._end_line(bytes(self._line) + line)
            self._line.clear()
            if event is not None:
                events.append(event)
        self._line += rest
        if self._size + len(self._line) > MOST_EVENT_BYTES:
            raise ValueError(f"an event has more than {MOST_EVENT_BYTES} bytes")
        return events

    def _end_line(self, line: bytes) -> str | None:
        """The data of an event, if the line ends one."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(line)
            return None
        data, self._data, self._size = self._data, [], 0
        return b"\n".join(data).decode() if data else None
