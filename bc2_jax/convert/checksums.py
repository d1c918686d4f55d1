"""Checksums of weight files: a flipped bit in a weight changes no shape and no name.

The expected SHA-256 is often known: from SHA256SUMS, from the Hugging Face cache, which names files by it, or from the
metadata beside a download. A `pytorch_model*.bin` also has a CRC-32 for each tensor, which torch itself ignores.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from bc2_jax.convert.pickled import read_entries
from bc2_jax.files import file_sha256, sync

SUMS_NAME = "SHA256SUMS"
_BLOCK_BYTES = 8 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
# A leading backslash marks a name with escapes; no weight file has such a name.
_SUMS_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")


def expected_sha256(file: Path) -> tuple[str | None, str]:
    """(expected SHA-256 of a weight file, its source); (None, "") if unknown.

    Sources are SHA256SUMS in its folder, the blob name in a Hugging Face cache, and the metadata of `hf download
    --local-dir`. Raises ValueError if two of them disagree or one is malformed.
    """
    digests = list(_statements(file))
    if len({digest for digest, _ in digests}) > 1:
        raise ValueError(f"{file} has contradicting SHA-256: {'; '.join(f'{d} by {who}' for d, who in digests)}.")
    return digests[0] if digests else (None, "")


def _statements(file: Path) -> Iterator[tuple[str, str]]:
    sums = file.parent / SUMS_NAME
    if sums.is_file():
        yield from ((digest, str(sums)) for name, digest in read_sha256sums(sums) if Path(name) == Path(file.name))
    blob = Path(os.path.realpath(file))
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        yield blob.name, f"the name of {blob}"
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if metadata.is_file():
        # Lines: commit, etag, time. Outside large-file storage the etag is git's SHA-1 instead of a SHA-256.
        etag = "".join(metadata.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]).strip()
        if _SHA256.fullmatch(etag):
            yield etag, str(metadata)


def read_sha256sums(sums: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) per line, skipping comments as sha256sum does. Raises ValueError for any other line."""
    lines = sums.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#"):
            continue
        match = _SUMS_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{sums}: line {number} is not a SHA-256 and a file name: {line[:100]!r}.")
        yield match[2], match[1].lower()


def verify_file(file: Path, manifested: str | None = None) -> bool:
    """Reads the whole file and compares its checksum. Returns False if no checksum is known.

    The SHA-256 is compared with `manifested`, that of its checkpoint's manifest, or else with `expected_sha256`. If
    neither is known, a `.bin` file is checked against the CRC-32 of its zip entries, unless it was written without them
    (torch.serialization.set_crc32_options). Raises ValueError for a mismatch, and as `expected_sha256` and
    `pickled.read_entries`.
    """
    expected, who = expected_sha256(file) if manifested is None else (manifested, "the manifest of its checkpoint")
    if expected is None:
        return file.suffix == ".bin" and _verify_entries(file)
    if (found := file_sha256(file)) != expected:
        raise ValueError(
            f"{file} is damaged or not the expected file: its SHA-256 is {found}, {who} says {expected}; use "
            "--no-hashes to skip this check."
        )
    return True


def _verify_entries(file: Path) -> bool:
    checked = False
    for entry in read_entries(file).values():
        if entry.crc is None:
            continue
        found = 0
        for block in _blocks(file, entry.offset, entry.size):
            found = zlib.crc32(block, found)
        if found != entry.crc:
            raise ValueError(
                f"{file} is damaged: the CRC-32 of its storage {entry.name!r} is {found:08x}, expected {entry.crc:08x}."
            )
        checked = True
    return checked


def _blocks(file: Path, offset: int, size: int) -> Iterator[memoryview]:
    """The bytes of a part of a file in one reused buffer: a mapping would count as memory of this process."""
    buffer = memoryview(bytearray(min(size, _BLOCK_BYTES)))
    with file.open("rb", buffering=0) as raw:
        raw.seek(offset)
        while size:
            count = raw.readinto(buffer[:size])
            if not count:
                raise ValueError(f"{file} became shorter while it was read.")
            yield buffer[:count]
            size -= count


def write_sha256sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Writes SHA256SUMS of {file name: SHA-256}, sorted by name as `sha256sum` does, and syncs it to disk.

    Raises ValueError for a value that is not a SHA-256 or a name that is not a file name.
    """
    for name, digest in digests.items():
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{folder}: {digest!r} of {name} is not a SHA-256 in lower-case hexadecimal.")
        if name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
            raise ValueError(f"{folder}: {name!r} is not the name of a file in it.")
    with (folder / SUMS_NAME).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
    sync(folder / SUMS_NAME)
