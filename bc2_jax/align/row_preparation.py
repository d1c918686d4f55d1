"""Files of conversations -> a folder of packed rows for fine-tuning, or of pairs for preference tuning.

    OUT/manifest.json         as of packed text; `kind` is "chat" or "pairs", a document is a sample
    OUT/{train,validation}-00000-of-0000N.array_record
                              the rows; `data.row_file` defines how samples and targets are marked
    OUT/questions.jsonl       chat: the held-out conversations, {"messages": [...]}, the last one the expected answer
    OUT/pairs.jsonl           pairs: the held-out pairs, {"prompt": [...], "chosen": [...], "rejected": [...]} with all
                              other fields of their records
    OUT/margins.npz           pairs, if some have a margin: fp32 [P] of each row (`data.row_values`)
    OUT/conversations.json    counts of what was read, left out and cut (`Conversations`)
    OUT/problems.txt          a line for each record left out and each sample cut

A sample never crosses a row. A row of pairs holds the prompt of each pair once, then both answers. Which samples share
a row depends on the lengths of all samples of a split; rows are in the order of their first samples in the files, as
training shuffles them in every epoch. About `validation_fraction` of the samples are held out, at least one, chosen by
a hash of the messages before the first answer, so that other answers to the same question are on the same side.
"""

from __future__ import annotations

import array
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
from typing import Any, NamedTuple

import numpy as np

from bc2_jax.align.chat import Message
from bc2_jax.align.chat_rows import EncodedSamples, encode_samples, pack_best_fit
from bc2_jax.align.formats import Sample, find_files, read_file
from bc2_jax.align.pair_rows import Pair, as_pair, encode_pairs, split_pair
from bc2_jax.align.preparation_settings import Conversations, FileCounts, RowSettings
from bc2_jax.data.batch import row_to_example
from bc2_jax.data.out_folder import own_folder
from bc2_jax.data.packing import Kind, Split, SplitInfo, make_manifest, write_manifest
from bc2_jax.data.processes import ProcessPool
from bc2_jax.data.records import Invalid
from bc2_jax.data.row_file import TARGET, RowFilesWriter, token_ids
from bc2_jax.data.row_values import RowValues, digest_rows
from bc2_jax.data.text_files import TextFile, printable
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

logger = logging.getLogger(__name__)

QUESTIONS, PAIRS = "questions.jsonl", "pairs.jsonl"
CONVERSATIONS, PROBLEMS, MARGINS = "conversations.json", "problems.txt", "margins.npz"
_BATCH_CHARACTERS = 1 << 18
_BATCH_SAMPLES = 4096
_BATCHES_A_PROCESS = 4
_LOGGED_PROBLEMS = 20
_SHARED_BYTES = 16 << 20
"""One process finishes smaller inputs before others would have started."""
_READ_TOKENS = 1 << 20
_OF_EACH = ("dropped_rounds", "cut_tokens", "hashes")
"""Fields of `EncodedSamples` that, with its reasons, tell what became of a sample."""

Advance = Callable[[str, int], object]
"""Called with the name of a stage, and the number of samples encoded or rows written."""


class Content(NamedTuple):
    """What is packed: conversations, or pairs."""

    kind: Kind
    accept: Callable[[Sample | Invalid], Sample | Invalid]
    """What was read of a record, or Invalid if it can't be packed as this kind."""
    text: Callable[[Sample], Any]
    """What is encoded of a sample."""
    encode: Callable[[Tokenizer, RowSettings, Sequence[Any]], EncodedSamples]
    """Encodes texts; a module's function, as it runs in other processes."""
    held_out: str
    """Name of the file of held-out samples."""
    describe: Callable[[Sample], dict[str, Any]]
    """The record of a held-out sample, JSON values."""


def _encode_chat(
    tokenizer: Tokenizer, settings: RowSettings, conversations: Sequence[Sequence[Message]]
) -> EncodedSamples:
    return encode_samples(tokenizer, conversations, settings.max_length, settings.truncation)


def _describe_chat(sample: Sample) -> dict[str, Any]:
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in sample.messages]}


def _encode_pairs(tokenizer: Tokenizer, settings: RowSettings, pairs: Sequence[Pair]) -> EncodedSamples:
    return encode_pairs(tokenizer, pairs, settings.max_length, settings.inputs, settings.truncation)


_CHAT = Content("chat", lambda found: found, lambda sample: sample.messages, _encode_chat, QUESTIONS, _describe_chat)
_PAIRS = Content(
    "pairs", as_pair, split_pair, _encode_pairs, PAIRS,
    describe=lambda sample: {**split_pair(sample)._asdict(), **sample.fields},
)  # fmt: skip


def prepare(
    content: Content,
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    settings: RowSettings,
    *,
    processes: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda *_: None,
) -> Conversations:
    """Packs the samples in the files of `inputs` (formats: `align.formats`) into the folder `out_dir`.

    The folder appears complete or not at all and depends only on input, settings and tokenizer, not on the number of
    processes. Memory grows by about 500 bytes a sample; tokens are on disk twice until the end.

    Raises FileExistsError if `out_dir` exists, unless `overwrite`, which replaces nothing but packed rows; InUse if
    another process is making it; FileNotFoundError or ValueError for an illegal argument, too many unusable records
    (settings.max_invalid), or if no target is left to learn; RuntimeError if a process dies.
    """
    require(processes >= 1, "processes", processes, "it must be positive")
    out = Path(out_dir)
    with own_folder(out, overwrite) as publish:
        model = Tokenizer(tokenizer)
        files = find_files(inputs)
        if sum(file.size for file in files.files) < _SHARED_BYTES:
            processes = 1
        folder = out.with_name(f".{out.name}.conversations.incomplete")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            counts = Conversations(settings, skipped=files.skipped)
            encode = functools.partial(content.encode, model, settings)
            with ProcessPool(processes) as pool, _Samples(folder, counts, content) as samples:
                batches = _batches(_read(files.files, counts, content))
                while group := list(itertools.islice(batches, _BATCHES_A_PROCESS * processes)):
                    tasks = [[content.text(found) for found in batch if isinstance(found, Sample)] for batch in group]
                    for batch, encoded in zip(group, pool.run(encode, tasks), strict=True):
                        samples.add(batch, encoded)
                    advance("encoding", samples.read)
            _write(folder, samples, model, advance)
            publish(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return counts


prepare_chat, prepare_pairs = functools.partial(prepare, _CHAT), functools.partial(prepare, _PAIRS)
"""`prepare` of conversations (of a preference pair, the chosen answer), and of preference pairs."""


def _read(files: Sequence[TextFile], counts: Conversations, content: Content) -> Iterator[Sample | Invalid]:
    """Reads all files, and counts."""
    invalid = 0
    for file in files:
        here = FileCounts(printable(file.path), file.size)
        counts.files.append(here)
        for found in map(content.accept, read_file(file)):
            if isinstance(found, Sample):
                here.formats[found.format] = here.formats.get(found.format, 0) + 1
                counts.unanswered += found.cut
            else:
                here.invalid += found.at_least
                counts.invalid[found.kind] = counts.invalid.get(found.kind, 0) + found.at_least
                invalid += found.at_least
                limit = counts.settings.max_invalid
                require(limit is None or invalid <= limit, "max_invalid", limit, f"one more can't be used: {found}")
            yield found


def _batches(found: Iterable[Sample | Invalid]) -> Iterator[list[Sample | Invalid]]:
    batch: list[Sample | Invalid] = []
    characters = 0
    for one in found:
        batch.append(one)
        if isinstance(one, Sample):
            characters += sum(len(message["content"]) for message in [*one.messages, *(one.rejected or ())])
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_SAMPLES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Samples:
    """All samples: counts in memory; tokens, and texts that may be held out, on disk."""

    def __init__(self, folder: Path, counts: Conversations, content: Content) -> None:
        self.folder, self.counts, self.content, self.read = folder, counts, content, 0
        self._parts: list[EncodedSamples] = []
        self._tokens, self._texts = (folder / "tokens").open("wb"), (folder / "texts").open("wb")
        self._problems = (folder / PROBLEMS).open("w", encoding="utf-8", errors="backslashreplace")
        self._num_problems = 0
        self.margins = array.array("f")
        """Margin of each sample; NaN if unknown."""
        self.threshold = math.ceil(counts.settings.validation_fraction * 2**64)
        self._lowest = 2**64 if self.threshold else -1
        self.questions: list[tuple[int, int, int]] = []
        """(hash, first byte, number of bytes) in the file of texts, of each sample that may be held out."""

    def __enter__(self) -> _Samples:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._texts, self._problems):
            file.close()

    def add(self, batch: Sequence[Sample | Invalid], encoded: EncodedSamples) -> None:
        """Adds a batch; `encoded` has its samples."""
        self._tokens.write(encoded.tokens.tobytes())
        self._parts.append(encoded._replace(tokens=encoded.tokens[:0]))
        numbers = zip(encoded.reasons, *(getattr(encoded, name).tolist() for name in _OF_EACH), strict=True)
        for found in batch:
            if isinstance(found, Sample):
                self._add_one(found, *next(numbers))
            else:
                self._report(found.where, f"left out: {found.message}")

    def _add_one(self, sample: Sample, reason: str, dropped: int, cut: int, code: int) -> None:
        counts, limit = self.counts, self.counts.settings.max_length
        self.read += 1
        self.margins.append(math.nan if sample.margin is None else sample.margin)
        if sample.cut:
            self._report(sample.where, "the last user message is left out, because it has no answer")
        if reason:
            counts.dropped[reason] = counts.dropped.get(reason, 0) + 1
            too_long = f" (max_length = {limit}; {cut:,} tokens too many)" if cut else ""
            self._report(sample.where, f"left out: {reason}{too_long}")
            return
        counts.samples += 1
        counts.pairs += sample.rejected is not None
        counts.margins += sample.margin is not None
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
            self._hold_out(code, sample)

    def _report(self, where: str, problem: str) -> None:
        line = f"{where}: {problem}"
        self._num_problems += 1
        if self._num_problems <= _LOGGED_PROBLEMS:
            logger.warning("%s", line)
        if self._num_problems == _LOGGED_PROBLEMS + 1:
            logger.warning("there is more, listed in %s", PROBLEMS)
        self._problems.write(f"{line}\n")

    def _hold_out(self, code: int, sample: Sample) -> None:
        line = json.dumps(self.content.describe(sample), ensure_ascii=False, default=str).encode() + b"\n"
        self.questions.append((code, self._texts.tell(), len(line)))
        self._texts.write(line)

    def held_out(self, hashes: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Which of the kept samples are held out, bool [N], and their entries of `questions`, ordered by hash."""
        limit = self.threshold if hashes.min() < self.threshold else self._lowest + 1
        held_out = np.array([code < limit for code in hashes.tolist()], bool)
        if held_out.all():
            logger.warning("nothing is held out: all samples would be, and none left to train on")
            return np.zeros_like(held_out), []
        return held_out, sorted(question for question in self.questions if question[0] < limit)

    def numbers(self, name: str) -> np.ndarray:
        """A field of `EncodedSamples`, of all samples."""
        return np.concatenate([getattr(part, name) for part in self._parts])


def _write(folder: Path, samples: _Samples, model: Tokenizer, advance: Advance) -> None:
    """Writes everything except the problems, and removes temporary files."""
    counts, settings = samples.counts, samples.counts.settings
    if not counts.samples:
        lost = counts.invalid | counts.dropped
        found = ", ".join(f"{number} x {reason}" for reason, number in lost.items()) or "there is no record"
        raise ValueError(f"DATA is not valid: no sample is left to train on ({found}).")
    lengths, hashes = samples.numbers("lengths"), samples.numbers("hashes")
    starts, kept = np.cumsum(lengths) - lengths, np.flatnonzero(lengths)
    held_out, questions = samples.held_out(hashes[kept])
    tokens = np.memmap(folder / "tokens", "<u4", "r")
    sides: dict[Split, np.ndarray] = {"train": kept[~held_out], "validation": kept[held_out]}
    packed = {split: pack_best_fit(lengths[places], settings.inputs) for split, places in sides.items()}
    most = max(len(members) for rows in packed.values() for members in rows)
    margins = np.nan_to_num(np.asarray(samples.margins, np.float32))
    rows_of_pairs: list[tuple[np.ndarray, np.ndarray]] = []
    """Digest and margins of each row."""
    splits: dict[Split, SplitInfo] = {}
    for split, places in sides.items():
        writer = RowFilesWriter(folder, split, settings.rows_per_file)
        for number, members in enumerate(packed[split]):
            inputs = np.concatenate([tokens[starts[i] : starts[i] + lengths[i]] for i in places[members]])
            row = np.pad(inputs, (0, settings.inputs + 1 - len(inputs)), constant_values=model.pad_id)
            writer.write(row)
            if counts.margins:
                values = np.pad(margins[places[members]], (0, most - len(members)))
                rows_of_pairs.append((digest_rows(row_to_example(row[None])), values))
            if number % 1024 == 0:
                advance(f"packing {split}", number)
        files = writer.close()
        rows = sum(file.rows for file in files)
        characters, octets, size = (
            int(samples.numbers(name)[places].sum()) for name in ("characters", "bytes", "lengths")
        )
        padding = rows * settings.inputs - size
        splits[split] = SplitInfo(len(places), characters, octets, size, rows, padding, files)
    if rows_of_pairs:
        _save_margins(rows_of_pairs, folder / MARGINS)
    for start in range(0, len(tokens), _READ_TOKENS):
        part = tokens[start : start + _READ_TOKENS]
        counts.targets += int(np.count_nonzero(part & TARGET))
        counts.turns += int(np.count_nonzero(token_ids(part) == model.assistant_id))
    counts.tokens, counts.held_out = len(tokens), splits["validation"].documents
    counts.rows = sum(info.rows for info in splits.values())
    counts.padding = sum(info.padding for info in splits.values())
    del tokens
    if questions:
        with (folder / "texts").open("rb") as texts, (folder / samples.content.held_out).open("wb") as out:
            for _, first, size in questions:
                texts.seek(first)
                out.write(texts.read(size))
    text = json.dumps(dataclasses.asdict(counts), indent=1) + "\n"
    (folder / CONVERSATIONS).write_text(text, "utf-8")
    invalid, dropped = sum(counts.invalid.values()), sum(counts.dropped.values())
    manifest = make_manifest(
        model, settings.inputs, settings.validation_fraction, splits,
        empty_documents=dropped, invalid_documents=invalid, kind=samples.content.kind,
        most_pairs=most if samples.content.kind == "pairs" else 0,
    )  # fmt: skip
    write_manifest(folder, manifest)
    for name in ("tokens", "texts", *[PROBLEMS] * (not (folder / PROBLEMS).stat().st_size)):
        (folder / name).unlink()


def _save_margins(rows: Sequence[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Writes the margins of rows; warns of rows that equal an earlier row with other margins, which they then get."""
    digests, values = np.concatenate([digest for digest, _ in rows]), np.stack([margins for _, margins in rows])
    kept = RowValues(digests, values)
    known, kept_values = kept.arrays()
    differ = np.any(kept_values[np.searchsorted(known, digests)] != values, axis=-1)
    if differ.any():
        logger.warning(
            "%d of %d rows have the same pairs as an earlier row with other margins, and get those of the first",
            np.count_nonzero(differ), len(digests),
        )  # fmt: skip
    kept.save(path)
