"""The files of the chat page, held in memory under fixed names: a request never becomes a path."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "txt": "text/plain; charset=utf-8",
}
INDEX = "index.html"
ICONS = ("favicon.svg", "favicon.ico")


class PageFile(NamedTuple):
    """One file."""

    content: bytes
    kind: str
    """Its Content-Type."""
    tag: str
    """Its ETag."""


def read_page() -> Mapping[str, PageFile]:
    """The files of `bc2_jax/serve/page` by name; none where the package has no page."""
    folder = importlib.resources.files("bc2_jax.serve") / "page"
    found = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            content = file.read_bytes()
            found[file.name] = PageFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found
