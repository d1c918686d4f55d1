"""Files of conversations -> a folder of packed rows, as many samples in each row as fit.

    OUT/manifest.json         what is here, as of packed text; `kind` is "chat", a document is a sample
    OUT/{train,validation}-00000-of-0000N.array_record
                              the rows; `data.row_file` says how samples and targets are marked
    OUT/questions.jsonl       the held-out conversations, {"messages": [...]}, the last message the expected answer
    OUT/conversations.json    what was read, left out and cut (`Conversations`)
    OUT/problems.txt          a line for each record that was left out and each sample that was cut

A sample never crosses a row: rows of `max_length` inputs hold samples of up to so many tokens. Which samples share a
row depends on the lengths of all of a split; rows are in the order of their first samples in the files (training
shuffles them anew in every epoch). About `validation_fraction` of the samples are held out, at least one, chosen by a
hash of the messages before the first answer, so that other answers to the same question are on the same side.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from bc2_jax.align.chat import Message
from bc2_jax.align.chat_rows import EncodedSamples, Truncation, encode_samples, pack_best_fit
from bc2_jax.align.formats import Sample, find_files, read_file
from bc2_jax.data.packing import (
    Manifest,
    Split,
    SplitInfo,
    check_out_dir,
    check_packing,
    publish,
    write_manifest,
)
from bc2_jax.data.processes import ProcessPool
from bc2_jax.data.records import Invalid
from bc2_jax.data.row_file import TARGET, RowFilesWriter, token_ids
from bc2_jax.data.text_files import TextFile, printable
from bc2_jax.files import lock
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import choices, require

logger = logging.getLogger(__name__)

CONVERSATIONS, QUESTIONS, PROBLEMS = "conversations.json", "questions.jsonl", "problems.txt"
_FORMAT = 1
_BATCH_CHARACTERS = 1 << 18
_BATCH_SAMPLES = 4096
_BATCHES_A_PROCESS = 4
_LOGGED_PROBLEMS = 20
_READ_TOKENS = 1 << 20
_OF_EACH = ("lengths", "dropped_rounds", "cut_tokens", "hashes")
"""Fields of `EncodedSamples` that tell what became of a sample."""

Advance = Callable[[str, int], object]
"""Told what is done, and how many samples were encoded or rows written."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What rows depend on, besides their input and tokenizer."""

    max_length: int = 4096
    """Tokens of the longest sample, and of a row."""
    validation_fraction: float = 0.01
    truncation: Truncation = "rounds"
    rows_per_file: int = 65_536
    max_invalid: int | None = None
    """Records that may be invalid before it is an error; None: any number."""

    def __post_init__(self) -> None:
        require(self.max_length >= 1, "max_length", self.max_length, "it must be positive")
        check_packing(self.max_length, self.validation_fraction, self.rows_per_file)
        legal = get_args(Truncation)
        require(self.truncation in legal, "truncation", self.truncation, f"it must be {choices(legal)}")
        ok = self.max_invalid is None or self.max_invalid >= 0
        require(ok, "max_invalid", self.max_invalid, "it must be at least 0, or None")


@dataclasses.dataclass
class FileCounts:
    """What was found in one file."""

    path: str
    size: int
    """Bytes, as stored."""
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples in each format, by its name."""
    invalid: int = 0
    """Records that can't be used."""


@dataclasses.dataclass
class Conversations:
    """What was read and what became of it."""

    settings: Settings
    files: list[FileCounts] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Files of the folders that are none of conversations."""
    invalid: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records that can't be used, by the reason."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples that were left out, by the reason."""
    unanswered: int = 0
    """Samples whose last user message was left out, because it has no answer."""
    samples: int = 0
    """Those in the rows; so are all numbers below."""
    pairs: int = 0
    """Of them, preference pairs: the chosen answer is trained on."""
    shortened: int = 0
    """Samples that lost their oldest rounds."""
    dropped_rounds: int = 0
    cut: int = 0
    """Samples that lost their end."""
    cut_tokens: int = 0
    turns: int = 0
    """Answers."""
    tokens: int = 0
    targets: int = 0
    rows: int = 0
    padding: int = 0
    """Inputs of the rows that are no token."""
    held_out: int = 0
    """Samples for validation."""
    format: int = _FORMAT


def prepare_chat(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    settings: Settings,
    *,
    processes: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda *_: None,
) -> Conversations:
    """Makes the folder `out_dir` of the conversations in the files of `inputs` (see `align.formats`).

    It appears complete or not at all, and depends on the input, the settings and the tokenizer alone, not on the number
    of processes. Memory grows by some 100 bytes a sample, not with its length; the tokens are twice on disk meanwhile.
    Raises FileExistsError if `out_dir` is there, unless `overwrite`, which only ever replaces packed rows; InUse if
    another process is making it; FileNotFoundError or ValueError for an argument that is not legal, for more invalid
    records than settings.max_invalid, or if nothing can be learned; RuntimeError if a process dies.
    """
    out = Path(out_dir)
    check_out_dir(out, overwrite)
    model = Tokenizer(tokenizer)
    files = find_files(inputs)
    with lock(out.with_name(f".{out.name}.lock"), f"out_dir = {str(out)!r}"), ProcessPool(processes) as pool:
        check_out_dir(out, overwrite)
        folder = out.with_name(f".{out.name}.conversations.incomplete")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            counts = Conversations(settings, skipped=files.skipped)
            samples = _Samples(folder, counts)
            group_size = _BATCHES_A_PROCESS * processes
            task = functools.partial(_encode_batch, model.path, settings)
            with samples:
                batches = _batches(_read(files.files, counts))
                while group := list(itertools.islice(batches, group_size)):
                    tasks = [[found.messages for found in batch if isinstance(found, Sample)] for batch in group]
                    # Processes take a second to start, in which this one encodes a megabyte.
                    found = pool.run(task, tasks) if len(tasks) > 1 else [task(tasks[0])]
                    for batch, encoded in zip(group, found, strict=True):
                        samples.add(batch, encoded)
                    advance("encoding", samples.read)
            _write(folder, samples, model, advance)
            check_out_dir(out, overwrite)  # again: that may be hours later
            publish(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return counts


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _encode_batch(tokenizer: Path, settings: Settings, conversations: Sequence[Sequence[Message]]) -> EncodedSamples:
    """A task of a process."""
    return encode_samples(conversations, _tokenizer(tokenizer), settings.max_length, settings.truncation)


def _read(files: Sequence[TextFile], counts: Conversations) -> Iterator[Sample | Invalid]:
    """What all files hold, counted."""
    invalid = 0
    for file in files:
        here = FileCounts(printable(file.path), file.size)
        counts.files.append(here)
        for found in read_file(file):
            if isinstance(found, Sample):
                here.formats[found.format] = here.formats.get(found.format, 0) + 1
                counts.unanswered += found.cut
            else:
                here.invalid += found.records
                counts.invalid[found.kind] = counts.invalid.get(found.kind, 0) + found.records
                invalid += found.records
                limit = counts.settings.max_invalid
                require(limit is None or invalid <= limit, "max_invalid", limit, f"one more can't be used: {found}")
            yield found


def _batches(found: Iterable[Sample | Invalid]) -> Iterator[list[Sample | Invalid]]:
    batch: list[Sample | Invalid] = []
    characters = 0
    for one in found:
        batch.append(one)
        if isinstance(one, Sample):
            characters += sum(len(message["content"]) for message in one.messages)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_SAMPLES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Samples:
    """All samples: numbers in memory, tokens and the texts that may be held out on disk."""

    def __init__(self, folder: Path, counts: Conversations) -> None:
        self.folder, self.counts, self.read = folder, counts, 0
        self._parts: list[EncodedSamples] = []
        self._tokens, self._texts = (folder / "tokens").open("wb"), (folder / "texts").open("wb")
        self._problems = (folder / PROBLEMS).open("w", encoding="utf-8", errors="backslashreplace")
        self._num_problems = 0
        self.threshold = math.ceil(counts.settings.validation_fraction * 2**64)
        self._lowest = 2**64 if self.threshold else -1
        self.questions: list[tuple[int, int, int]] = []
        """(hash, first byte, bytes) in the file of texts of each that may be held out."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._texts, self._problems):
            file.close()

    def add(self, batch: Sequence[Sample | Invalid], encoded: EncodedSamples) -> None:
        """`encoded` has the samples of a batch."""
        self._tokens.write(encoded.tokens.tobytes())
        self._parts.append(encoded._replace(tokens=encoded.tokens[:0]))
        numbers = zip(*(getattr(encoded, name).tolist() for name in _OF_EACH), strict=True)
        for found in batch:
            if isinstance(found, Sample):
                self._add_one(found, *next(numbers))
            else:
                self._report(found.where, f"left out: {found.reason}")

    def _add_one(self, sample: Sample, length: int, dropped: int, cut: int, code: int) -> None:
        counts, limit = self.counts, self.counts.settings.max_length
        self.read += 1
        if sample.cut:
            self._report(sample.where, "the last user message is left out, because it has no answer")
        if not length:
            long = cut and counts.settings.truncation == "drop"
            reason = "longer than max_length" if long else "no target within max_length"
            counts.dropped[reason] = counts.dropped.get(reason, 0) + 1
            self._report(sample.where, f"left out: {reason} = {limit} ({limit + cut} tokens)")
            return
        counts.samples += 1
        counts.pairs += sample.rejected is not None
        counts.shortened += dropped > 0
        counts.dropped_rounds += dropped
        counts.cut += cut > 0
        counts.cut_tokens += cut
        if dropped:
            self._report(sample.where, f"its {dropped} oldest round(s) are left out, to fit max_length = {limit}")
        if cut:
            self._report(sample.where, f"its last {cut} token(s) are cut off, to fit max_length = {limit}")
        if code < self.threshold or code <= self._lowest:
            self._lowest = min(self._lowest, code)
            self._ask(code, sample.messages)

    def _report(self, where: str, problem: str) -> None:
        line = f"{where}: {problem}"
        self._num_problems += 1
        if self._num_problems <= _LOGGED_PROBLEMS:
            logger.warning("%s", line)
        if self._num_problems == _LOGGED_PROBLEMS + 1:
            logger.warning("there is more, listed in %s", PROBLEMS)
        self._problems.write(f"{line}\n")

    def _ask(self, code: int, messages: Sequence[Message]) -> None:
        shown = [{"role": message["role"], "content": message["content"]} for message in messages]
        line = json.dumps({"messages": shown}, ensure_ascii=False).encode() + b"\n"
        self.questions.append((code, self._texts.tell(), len(line)))
        self._texts.write(line)

    def held_out(self, hashes: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Which of the kept samples are held out, bool [N], and their questions in the order of the hashes."""
        limit = self.threshold if hashes.min() < self.threshold else self._lowest + 1
        held_out = np.array([code < limit for code in hashes.tolist()], bool)
        if held_out.all():
            logger.warning("nothing is held out: all samples would be, and none left to train on")
            return np.zeros_like(held_out), []
        return held_out, sorted(question for question in self.questions if question[0] < limit)

    def numbers(self, name: str) -> np.ndarray:
        """A field of all that were added."""
        return np.concatenate([getattr(part, name) for part in self._parts])


def _write(folder: Path, samples: _Samples, model: Tokenizer, advance: Advance) -> None:
    """Writes everything but the problems, and removes what is not part of the result."""
    counts, settings = samples.counts, samples.counts.settings
    if not counts.samples:
        lost = counts.invalid | counts.dropped
        found = ", ".join(f"{number} with {reason}" for reason, number in lost.items()) or "no record"
        raise ValueError(f"DATA is not valid: nothing can be learned of it; it has {found}.")
    lengths, hashes = samples.numbers("lengths"), samples.numbers("hashes")
    starts, kept = np.cumsum(lengths) - lengths, np.flatnonzero(lengths)
    held_out, questions = samples.held_out(hashes[kept])
    tokens = np.memmap(folder / "tokens", "<u4", "r")
    splits: dict[Split, SplitInfo] = {}
    sides: list[tuple[Split, np.ndarray]] = [("train", kept[~held_out]), ("validation", kept[held_out])]
    for split, places in sides:
        writer = RowFilesWriter(folder, split, settings.rows_per_file)
        for row, members in enumerate(pack_best_fit(lengths[places], settings.max_length)):
            inputs = np.concatenate([tokens[starts[i] : starts[i] + lengths[i]] for i in places[members]])
            writer.write(np.pad(inputs, (0, settings.max_length + 1 - len(inputs)), constant_values=model.pad_id))
            if row % 1024 == 0:
                advance(f"packing {split}", row)
        files = writer.close()
        rows = sum(file.rows for file in files)
        characters, octets, size = (
            int(samples.numbers(name)[places].sum()) for name in ("characters", "bytes", "lengths")
        )
        padding = rows * settings.max_length - size
        splits[split] = SplitInfo(len(places), characters, octets, size, rows, padding, files)
    for start in range(0, len(tokens), _READ_TOKENS):
        part = tokens[start : start + _READ_TOKENS]
        counts.targets += int(np.count_nonzero(part & TARGET))
        counts.turns += int(np.count_nonzero(token_ids(part) == model.assistant_id))
    counts.tokens, counts.held_out = len(tokens), splits["validation"].documents
    counts.rows = sum(info.rows for info in splits.values())
    counts.padding = sum(info.padding for info in splits.values())
    del tokens
    if questions:
        with (folder / "texts").open("rb") as texts, (folder / QUESTIONS).open("wb") as out:
            for _, first, size in questions:
                texts.seek(first)
                out.write(texts.read(size))
    text = json.dumps(dataclasses.asdict(counts), indent=1) + "\n"
    (folder / CONVERSATIONS).write_text(text, "utf-8")
    invalid, dropped = sum(counts.invalid.values()), sum(counts.dropped.values())
    manifest = Manifest(
        sequence_length=settings.max_length,
        vocab_size=model.vocab_size,
        eos_id=model.eos_id,
        pad_id=model.pad_id,
        tokenizer_sha256=model.fingerprint,
        validation_fraction=settings.validation_fraction,
        documents=counts.samples + invalid + dropped,
        empty_documents=dropped,
        invalid_documents=invalid,
        train=splits["train"],
        validation=splits["validation"],
        kind="chat",
    )
    write_manifest(folder, manifest)
    for name in ("tokens", "texts", *[PROBLEMS] * (not (folder / PROBLEMS).stat().st_size)):
        (folder / name).unlink()
