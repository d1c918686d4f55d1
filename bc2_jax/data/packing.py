"""Packed rows: encoding documents, cutting the token stream into rows, and the manifest of a folder of rows.

The documents of a split form one stream, `tokens(document) eos tokens(document) eos ...`, cut into rows of T + 1
tokens. Row r holds tokens r * T .. r * T + T: the token that neighbours share is the last target of one row and the
first input of the next, so every token but the stream's first is a target exactly once. The last row is padded.
Nothing of a document is dropped.

    OUT/manifest.json                                    counts, settings, tokenizer, SHA-256 of each file
    OUT/{train,validation}-00000-of-0000N.array_record   rows and their checksums, as `row_file` writes them
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from bc2_jax.data.row_file import FileInfo, RowFile, RowFilesWriter
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import choices, is_inside, require

Split = Literal["train", "validation"]
Kind = Literal["text", "chat", "pairs"]
"""Content of rows: a stream of text, conversations, or prompts with a chosen and a rejected answer (see `row_file`)."""
SPLITS: tuple[Split, ...] = ("train", "validation")
MANIFEST = "manifest.json"
_FORMAT = 1
_BATCH_CHARACTERS = 1 << 20
_BATCH_TEXTS = 4096
# Longer documents are encoded in parts of about this many characters, with the same ids: SentencePiece is a fifth
# faster then, and takes some 100 bytes of memory a character.
_PART_CHARACTERS = 1 << 10
_BUFFERED_TOKENS = 1 << 18
_CHUNK_TOKENS = 1 << 16
_OPENING_THREADS = 32
_NAMED_PROBLEMS = 3

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """The training or the held-out part of packed rows."""

    documents: int
    characters: int
    bytes: int
    """UTF-8 bytes of the text."""
    tokens: int
    """Tokens of the stream, with one eos a document."""
    rows: int
    padding: int
    """Pad tokens that fill the last row."""
    files: tuple[FileInfo, ...]


@dataclasses.dataclass(frozen=True)
class RowManifest:
    """The content of manifest.json: what a folder of packed rows holds."""

    sequence_length: int
    """T; a row has T + 1 tokens."""
    vocab_size: int
    eos_id: int
    pad_id: int
    tokenizer_sha256: str
    validation_fraction: float
    documents: int
    """Documents read: of both splits, empty and invalid ones included."""
    empty_documents: int
    invalid_documents: int
    """Unreadable documents. Those of a corpus belong to no part: corpus.json counts them."""
    train: SplitInfo
    validation: SplitInfo
    format: int = _FORMAT
    kind: Kind = "text"
    most_pairs: int = 0
    """Largest number of pairs in a row; 0 in rows of another kind."""

    def split(self, split: Split) -> SplitInfo:
        return self.train if split == "train" else self.validation


def load_manifest(path: str | os.PathLike[str]) -> RowManifest:
    """Reads PATH/manifest.json. Raises FileNotFoundError without one, ValueError for a damaged one."""
    file = Path(path, MANIFEST)
    if not file.is_file():
        raise FileNotFoundError(
            f"data.sources.path = {str(path)!r} has no {MANIFEST}: it must be written by tools/tokenize_corpus.py or "
            "tools/prepare_chat.py."
        )
    try:
        fields: dict[str, Any] = json.loads(file.read_bytes())
        for split in SPLITS:
            files = tuple(FileInfo(**info) for info in fields[split].pop("files"))
            fields[split] = SplitInfo(**fields[split], files=files)
        manifest = RowManifest(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is not a manifest of packed rows, format {_FORMAT}: {error!r}.") from error
    if manifest.format != _FORMAT:
        raise ValueError(f"format = {manifest.format} in {str(file)!r} is not valid: this version reads {_FORMAT}.")
    kinds = get_args(Kind)
    require(manifest.kind in kinds, f"kind in {str(file)!r}", manifest.kind, f"it must be {choices(kinds)}")
    for info in (*manifest.train.files, *manifest.validation.files):
        if not is_inside(info.name):
            raise ValueError(f"files.name = {info.name!r} in {str(file)!r} is not valid: it must be a file beside it.")
    return manifest


def read_rows(path: str | os.PathLike[str], split: Split) -> np.ndarray:
    """All rows of one split in memory, in the order of the text: uint32 [rows, T + 1]."""
    length = load_manifest(path).sequence_length + 1
    return np.concatenate([np.empty((0, length), "<u4"), *iterate_rows(path, split)])


def iterate_rows(path: str | os.PathLike[str], split: Split) -> Iterator[np.ndarray]:
    """The rows of one split in the order of the text, in chunks: uint32 [rows, T + 1]. Raises BadRow."""
    manifest = load_manifest(path)
    step = max(1, _CHUNK_TOKENS // manifest.sequence_length)
    for info in manifest.split(split).files:
        with RowFile(path, info, manifest.sequence_length) as file:
            for start in range(0, file.rows, step):
                records = file.read_range(start, min(start + step, file.rows))
                yield np.frombuffer(b"".join(records), "<u4").reshape(-1, manifest.sequence_length + 1)


def check_files(path: str | os.PathLike[str], manifest: RowManifest, split: Split) -> None:
    """Opens every file of a split. Raises FileNotFoundError or ValueError if one is missing, cannot be opened or is not
    the one of the manifest; of rows, the number and the checksums are read, not the content.
    """
    info = manifest.split(split)

    def problem(file: FileInfo) -> str | None:
        found = Path(path, file.name)
        if not found.is_file():
            raise FileNotFoundError(f"data.sources.path = {str(path)!r} is incomplete: {file.name} is missing.")
        if found.stat().st_size != file.size:
            return f"{file.name} has {found.stat().st_size} bytes where its manifest says {file.size}"
        try:
            with RowFile(path, file, manifest.sequence_length) as rows:
                rows.open()
        except ValueError as error:
            return f"{file.name}: {error}"
        return None

    rows = sum(file.rows for file in info.files)
    problems = [f"its manifest says {info.rows} {split} rows, and {rows} of its files"] if rows != info.rows else []
    # A corpus may have thousands of files on slow storage.
    with ThreadPoolExecutor(_OPENING_THREADS) as threads:
        problems += filter(None, threads.map(problem, info.files))
    if problems:
        raise ValueError(f"data.sources.path = {str(path)!r} is damaged: {'; '.join(problems[:_NAMED_PROBLEMS])}.")


@dataclasses.dataclass
class TextCounts:
    """Counts of what went into a stream."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0

    def add_text(self, text: str) -> None:
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text) if text.isascii() else sum(len(part.encode()) for part in _slices(text))


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, equal on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in _slices(text):
        digest.update(part.encode())
    return int.from_bytes(digest.digest(), "little")


def split_of(document: str, validation_fraction: float) -> Split:
    """`validation` for about this fraction of documents, by a hash of the text, so copies are in one split."""
    return "validation" if hash_text(document) < validation_fraction * 2**64 else "train"


def encode_texts(
    texts: Iterable[tuple[Key, str]], tokenizer: Tokenizer, num_threads: int = -1
) -> Iterator[tuple[Key, np.ndarray]]:
    """(key, ids uint32 [n]) of each text and its eos, in order; a long text comes in several parts.

    Memory grows with neither the number nor the length of texts, beyond the texts themselves. Raises ValueError if the
    tokenizer cannot spell a text without the pad id.
    """
    eos = np.array([tokenizer.eos_id], "<u4")
    for batch in _batches(texts, tokenizer):
        encoded = tokenizer.encode_batch([text for _, text, _ in batch], num_threads=num_threads)
        for (key, _, is_last), ids in zip(batch, encoded, strict=True):
            array = np.array(ids, "<u4")
            if not array.all():  # pad is 0
                raise ValueError(
                    f"tokenizer = {str(tokenizer.path)!r} can't spell all of the text: packing needs byte fallback, "
                    f"because id {tokenizer.pad_id} marks padding."
                )
            yield key, array
            if is_last:
                yield key, eos


def _batches(texts: Iterable[tuple[Key, str]], tokenizer: Tokenizer) -> Iterator[list[tuple[Key, str, bool]]]:
    """(key, part, whether it is the text's last one) in batches of about a million characters."""
    batch: list[tuple[Key, str, bool]] = []
    characters = 0
    for key, text in texts:
        done = 0
        for part in tokenizer.cut(text, _PART_CHARACTERS):
            done += len(part)
            batch.append((key, part, done == len(text)))
            characters += len(part)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _slices(text: str) -> Iterator[str]:
    if len(text) <= _BATCH_CHARACTERS:
        yield text
    else:
        for start in range(0, len(text), _BATCH_CHARACTERS):
            yield text[start : start + _BATCH_CHARACTERS]


class RowWriter:
    """Writes a stream of tokens as the rows of one split."""

    def __init__(self, folder: str | os.PathLike[str], split: Split, sequence_length: int, rows_per_file: int) -> None:
        self._sequence_length = sequence_length
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._files = RowFilesWriter(folder, split, rows_per_file)

    def add(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= _BUFFERED_TOKENS:
            self._write_full_rows()

    def close(self, counts: TextCounts, pad_id: int) -> SplitInfo:
        """Pads the last row and names the files; `counts` are those of the stream."""
        rest = self._write_full_rows()
        # A single pending token was the last target of the previous row; as an input it would have no target.
        padding = 0
        if len(rest) > 1:
            padding = self._sequence_length + 1 - len(rest)
            self._files.write(np.pad(rest, (0, padding), constant_values=pad_id))
        files = self._files.close()
        rows = sum(file.rows for file in files)
        return SplitInfo(**dataclasses.asdict(counts), rows=rows, padding=padding, files=files)

    def _write_full_rows(self) -> np.ndarray:
        """Writes all full rows and returns the rest."""
        tokens = np.concatenate(self._pending) if self._pending else np.empty(0, "<u4")
        start = 0
        while len(tokens) - start > self._sequence_length:
            self._files.write(tokens[start : start + self._sequence_length + 1])
            start += self._sequence_length
        self._pending, self._num_pending = [tokens[start:]], len(tokens) - start
        return tokens[start:]


def check_packing(sequence_length: int, validation_fraction: float, rows_per_file: int) -> None:
    """Raises ValueError for an illegal argument."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length = {sequence_length} is not valid: it must be positive.")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction = {validation_fraction} is not valid: it must be in [0, 1).")
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file = {rows_per_file} is not valid: it must be positive.")


def make_manifest(
    tokenizer: Tokenizer, sequence_length: int, validation_fraction: float, splits: Mapping[Split, SplitInfo], *,
    empty_documents: int, invalid_documents: int, kind: Kind = "text", most_pairs: int = 0,
) -> RowManifest:  # fmt: skip
    """The manifest of `splits` that were made with `tokenizer`; the rest as the fields of `RowManifest`."""
    return RowManifest(
        sequence_length=sequence_length,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        tokenizer_sha256=tokenizer.fingerprint,
        validation_fraction=validation_fraction,
        documents=sum(info.documents for info in splits.values()) + empty_documents + invalid_documents,
        empty_documents=empty_documents,
        invalid_documents=invalid_documents,
        train=splits["train"],
        validation=splits["validation"],
        kind=kind,
        most_pairs=most_pairs,
    )


def write_manifest(folder: Path, manifest: RowManifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
