"""Whether weight files are the ones that were published: one flipped bit in a weight changes no shape and no name.

What a file should be is often known: from a SHA256SUMS file beside it, or because the Hugging Face hub's client names
what it downloads by its SHA-256. A `pytorch_model*.bin` also carries the CRC-32 of each of its tensors, which torch
itself does not look at.
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
# A backslash in front says that the name has escapes; no weight file has such a name.
_SUMS_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")


def expected_sha256(file: Path) -> str | None:
    """What the surroundings of a weight file say its SHA-256 is; None if they say nothing.

    Asked are SHA256SUMS in its folder, the name of the blob that it links to in a cache of the Hugging Face hub,
    and the metadata that `hf download --local-dir` leaves. Raises ValueError if two of them disagree or one of the
    lists is malformed.
    """
    return _expect(file)[0]


def _expect(file: Path) -> tuple[str | None, str]:
    """The expected SHA-256, and who says so."""
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
        # Commit, etag, time. The etag of a file that is not in large-file storage is not a SHA-256, but git's SHA-1.
        etag = "".join(metadata.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]).strip()
        if _SHA256.fullmatch(etag):
            yield etag, str(metadata)


def read_sha256sums(sums: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of each line; comments are skipped as sha256sum does. Raises ValueError if a line is neither."""
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
    """Whether there was something to check `file` against; then it was read whole and is what it should be.

    Compared is its SHA-256 with that of its checkpoint's manifest, `manifested`, or else with `expected_sha256`. Where
    none is known, a `.bin` file is compared with the CRC-32 of its zip entries, unless it was written without
    (torch.serialization.set_crc32_options). Raises ValueError if they differ, or if `expected_sha256` or
    `pickled.read_entries` does.
    """
    expected, who = _expect(file) if manifested is None else (manifested, "the manifest of its checkpoint")
    if expected is None:
        return file.suffix == ".bin" and _verify_entries(file)
    if (found := file_sha256(file)) != expected:
        raise ValueError(
            f"{file} is damaged or not the expected file: its SHA-256 is {found}, {who} says {expected}; --no-hashes "
            "takes it as it is."
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
    """The bytes of a part of a file, always in the same memory: a mapping would count as memory of this process."""
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
    """Writes SHA256SUMS of file name -> SHA-256, sorted by name, as `sha256sum` does; synced to disk.

    Raises ValueError for what is not a SHA-256, and for what is not the name of a file in the folder.
    """
    for name, digest in digests.items():
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{folder}: {digest!r} of {name} is not a SHA-256 in lower-case hexadecimal.")
        if name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
            raise ValueError(f"{folder}: {name!r} is not the name of a file in it.")
    with (folder / SUMS_NAME).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
    sync(folder / SUMS_NAME)
