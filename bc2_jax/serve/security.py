"""API keys, allowed host names, and headers against misuse in browsers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

from bc2_jax.serve.errors import ApiError
from bc2_jax.validation import require

_LEAST_CHARACTERS = 16
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page; other replies may load nothing."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Default headers of every reply. Without Access-Control-Allow-Origin, pages of other sites can read nothing."""


class Keys:
    """API keys by SHA-256, compared in constant time."""

    def __init__(self, keys: Iterable[tuple[str, str]]):
        """(owner name, key) of each; the name appears in logs and takes turns in the queue."""
        self._names = {hashlib.sha256(key.encode()).digest(): name for name, key in keys}

    def __bool__(self) -> bool:
        return bool(self._names)

    def find_owner(self, authorization: str | None) -> str:
        """The owner of the key in an Authorization header; raises ApiError for any other key."""
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = [name for digest, name in self._names.items() if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not found:
            reason = "an API key is needed" if not authorization else "this API key is not valid"
            message = f"{reason}: send the header Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")
        return found[0]


def read_keys(path: Path) -> list[tuple[str, str]]:
    """The keys in a file, one per line as `KEY` or `NAME KEY`; empty lines and lines starting with # are skipped.

    Raises OSError if it cannot be read, and ValueError (never containing a key) for a key that is short or not
    printable ASCII, and for a file without keys.
    """
    found: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise ValueError(f"{path}: line {number} is not valid: it must be KEY or NAME KEY.")
        check_key(f"{path}: the key in line {number}", words[-1])
        found.append((words[0] if len(words) == 2 else f"key-{len(found) + 1}", words[-1]))
    if not found:
        raise ValueError(f"{path} has no API key: write one a line.")
    return found


def check_key(name: str, key: str) -> None:
    """Raises ValueError, without the key, unless it is long enough and can be sent in a header."""
    if len(key) < _LEAST_CHARACTERS or not (key.isascii() and key.isprintable()) or " " in key:
        legal = f"it must be at least {_LEAST_CHARACTERS} printable ASCII characters without a space"
        raise ValueError(f"{name} is not valid: {legal}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, has_keys: bool) -> None:
    """Raises ValueError for an address that other machines can reach while there is no key."""
    legal = "without an API key it must be a loopback address such as 127.0.0.1; give --api-key-file"
    require(has_keys or is_loopback(host), "--host", host, legal)


class Hosts:
    """Names that a Host header may have.

    Against DNS rebinding: a page of another site can point its own name at this machine, and its requests then carry
    that name.
    """

    def __init__(self, host: str, others: Sequence[str] = ()):
        self._names = {name.lower() for name in others}
        if is_loopback(host):
            self._names |= {"localhost", "127.0.0.1", "[::1]", host.lower()}
        self._all = not self._names

    def check(self, given: Sequence[str]) -> None:
        """Raises ApiError unless there is exactly one Host header, with a legal name."""
        if len(given) != 1:
            raise ApiError(400, "exactly one Host header is needed.", code="invalid_host")
        name = given[0].lower()
        if not name.endswith("]"):  # "[::1]" has no port
            name = name.rpartition(":")[0] or name
        if not self._all and name not in self._names:
            message = "the Host header does not name this server; an operator may allow a name with --allowed-host."
            raise ApiError(403, message, code="invalid_host")
