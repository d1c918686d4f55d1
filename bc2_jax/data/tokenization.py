"""Files of text -> a corpus of packed rows, on several processes, resumable.

The input is cut into units of some megabytes. Each unit is tokenized into one file, sorted by part and split; then each
part is packed from the units in order. The output depends on input, settings and tokenizer alone, not on the number of
processes.

    OUT/../.OUT.KEY.incomplete/   KEY is a hash of the input files, the settings and the tokenizer
        units/00000.tokens        little-endian uint32
        units/00000.json          its index; written last, so a unit with it is finished
        parts/SOURCE/qBUCKET/...  finished parts

A run with the same arguments resumes from the finished units and parts.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.data.corpus import (
    CORPUS,
    PROBLEMS,
    Corpus,
    CorpusPart,
    InputFile,
    Part,
    bucket_of,
    log_missing_rows,
    name_parts,
    weight_level,
)
from bc2_jax.data.documents import (
    Document,
    Fields,
    InvalidDocument,
    ScannedFile,
    Span,
    read_span,
    scan_file,
)
from bc2_jax.data.out_folder import own_folder
from bc2_jax.data.packing import (
    MANIFEST,
    RowWriter,
    Split,
    SplitInfo,
    TextCounts,
    check_packing,
    encode_texts,
    load_manifest,
    make_manifest,
    split_of,
    write_manifest,
)
from bc2_jax.data.processes import ProcessPool
from bc2_jax.data.text_files import TextFiles, find_text_files
from bc2_jax.files import fingerprint
from bc2_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_FORMAT = 2
_UNITS = 512
_UNIT_BYTES = range(2 << 20, 256 << 20)
_HELD_TOKENS = 1 << 22
"""Tokens that a process buffers before it writes them."""
_LOGGED_PROBLEMS = 100
_READ_TOKENS = 1 << 20

Advance = Callable[[str, int, int], object]
"""Called with a stage, its progress and its total."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a corpus depends on besides its input and tokenizer."""

    sequence_length: int = 4096
    quality_buckets: int = 4
    validation_fraction: float = 0.01
    rows_per_file: int = 65_536
    fields: Fields = Fields()

    def __post_init__(self) -> None:
        check_packing(self.sequence_length, self.validation_fraction, self.rows_per_file)
        if self.quality_buckets < 1:
            raise ValueError(f"quality_buckets = {self.quality_buckets} is not valid: it must be positive.")


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every process needs."""

    folder: Path
    tokenizer: Tokenizer
    settings: Settings


@dataclasses.dataclass(frozen=True)
class _Unit:
    index: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


@dataclasses.dataclass
class _Stream:
    """The documents of one part and split in one unit."""

    counts: TextCounts = dataclasses.field(default_factory=TextCounts)
    empty_documents: int = 0
    chunks: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(first token, number of tokens) in the unit's file."""


_Key = tuple[str, int, int, Split]
"""A part and the split."""


def tokenize_corpus(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    settings: Settings,
    *,
    processes: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda *_: None,
) -> Corpus:
    """Tokenizes and packs the files of `inputs` (see `documents`) into the corpus `out_dir` (see `corpus`).

    The folder appears complete or not at all. Unreadable input is counted, logged and listed in problems.txt. Raises
    FileExistsError if `out_dir` exists, unless `overwrite`, which replaces nothing but packed rows; InUse if another
    process is making it; FileNotFoundError or ValueError for an illegal argument, or if no document has text;
    RuntimeError if a process dies.
    """
    if processes < 1:
        raise ValueError(f"processes = {processes} is not valid: it must be positive.")
    out = Path(out_dir)
    # A second process would write the same units.
    with own_folder(out, overwrite) as publish, ProcessPool(processes) as pool:
        model = Tokenizer(tokenizer)
        corpus, folder = _make_corpus(find_text_files(inputs, "INPUT"), model, out, settings, pool, advance)
        publish(folder / "parts")
        shutil.rmtree(folder)
    log_missing_rows(out, corpus)
    return corpus


def _make_corpus(
    files: TextFiles, model: Tokenizer, out: Path, settings: Settings, pool: ProcessPool, advance: Advance
) -> tuple[Corpus, Path]:
    """Writes the corpus to parts/ of the returned folder."""
    found = [file.path for file in files.files]
    unit_bytes = min(max(sum(file.size for file in files.files) // _UNITS, _UNIT_BYTES.start), _UNIT_BYTES.stop)
    scans = pool.run(functools.partial(scan_file, fields=settings.fields, span_bytes=unit_bytes), found)
    key = _fingerprint(scans, model, settings)
    folder = out.with_name(f".{out.name}.{key}.incomplete")
    for other in out.parent.glob(f".{glob.escape(out.name)}.*.incomplete"):
        if other != folder:
            logger.warning("%s is left: an unfinished run with other input or settings wrote it", other)
    (folder / "units").mkdir(parents=True, exist_ok=True)
    for unfinished in [*folder.glob("part-*"), *(p for p in (folder / "units").iterdir() if len(p.suffix) == 33)]:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    job = _Job(folder, model, settings)

    units = _cut_units(scans, unit_bytes)
    missing = [unit for unit in units if not _unit_file(folder, unit.index, "json").is_file()]
    if len(missing) < len(units):
        logger.info("resuming: %d of %d units are finished", len(units) - len(missing), len(units))
    total = sum(unit.size for unit in units)
    done = total - sum(unit.size for unit in missing)

    def count_unit(unit: _Unit) -> None:
        nonlocal done
        done += unit.size
        advance("tokenizing", done, total)

    advance("tokenizing", done, total)
    pool.run(functools.partial(_tokenize_unit, job), missing, count_unit)

    streams, problems, lost = _read_units(folder, units, [scan.problem for scan in scans if scan.problem])
    problems += [f"{name}: the file is not read" for name in files.skipped]
    for line in problems[:_LOGGED_PROBLEMS]:
        logger.warning("left out: %s", line)
    if len(problems) > _LOGGED_PROBLEMS:
        logger.warning("left out: %d more, listed in %s", len(problems) - _LOGGED_PROBLEMS, PROBLEMS)
    parts = name_parts({key[:3] for key, found in streams.items() if any(s.counts.documents for _, s in found)})
    empty = sum(stream.empty_documents for found in streams.values() for _, stream in found)
    if not parts:
        shutil.rmtree(folder)
        raise ValueError(f"documents are not valid: none of the {lost + empty} has any text.")
    tasks = [
        (path, {split: streams.get((*part, split), []) for split in ("train", "validation")})
        for part, path in parts.items()
    ]
    packed = 0

    def count_part(_: object) -> None:
        nonlocal packed
        packed += 1
        advance("packing", packed, len(parts))

    advance("packing", 0, len(parts))
    pool.run(functools.partial(_pack_part, job), tasks, count_part)

    corpus = _describe(folder, settings, model, scans, streams, parts, empty, lost)
    rows = folder / "parts"
    (rows / CORPUS).write_text(json.dumps(dataclasses.asdict(corpus), indent=1) + "\n")
    if problems:
        (rows / PROBLEMS).write_text("".join(f"{line}\n" for line in problems), "utf-8", "backslashreplace")
    return corpus, folder


# ---------------------------------------------------------------------------------------------------------------- units


def _fingerprint(scans: Iterable[ScannedFile], tokenizer: Tokenizer, settings: Settings) -> str:
    files = [(scan.path, scan.size, scan.sha256) for scan in scans]
    about = [_FORMAT, files, tokenizer.fingerprint, dataclasses.asdict(settings)]
    return fingerprint(about, sort_keys=False)[:16]


def _cut_units(scans: Iterable[ScannedFile], unit_bytes: int) -> list[_Unit]:
    """Groups neighbouring spans to units of about `unit_bytes`."""
    units: list[_Unit] = []
    spans: list[Span] = []
    size = 0
    for span in (span for scan in scans for span in scan.spans):
        spans.append(span)
        size += span.size
        if size >= unit_bytes:
            units.append(_Unit(len(units), tuple(spans)))
            spans, size = [], 0
    if spans:
        units.append(_Unit(len(units), tuple(spans)))
    return units


def _unit_file(folder: Path, index: int, suffix: str) -> Path:
    return folder / "units" / f"{index:05d}.{suffix}"


def _tokenize_unit(job: _Job, unit: _Unit) -> None:
    """Writes the two files of a unit; each gets its name when it is complete."""
    streams: dict[_Key, _Stream] = {}
    problems: list[str] = []
    lost = 0

    def texts() -> Iterator[tuple[_Key, str]]:
        nonlocal lost
        for document in (found for span in unit.spans for found in read_span(span, job.settings.fields)):
            if isinstance(document, InvalidDocument):
                problems.append(document.reason)
                lost += document.documents
                continue
            key = _key(document, job.settings)
            stream = streams.setdefault(key, _Stream())
            if document.text:
                stream.counts.add_text(document.text)
                yield key, document.text
            else:
                stream.empty_documents += 1

    tokens = _unit_file(job.folder, unit.index, "tokens")
    temporary = tokens.with_suffix(f".{uuid.uuid4().hex}")
    held: dict[_Key, list[np.ndarray]] = {}
    num_held = written = 0
    with temporary.open("wb") as file:

        def write() -> None:
            nonlocal num_held, written
            for key, arrays in held.items():
                count = sum(map(len, arrays))
                streams[key].chunks.append((written, count))
                file.write(np.concatenate(arrays).tobytes())
                written += count
            held.clear()
            num_held = 0

        for key, ids in encode_texts(texts(), job.tokenizer, num_threads=1):
            streams[key].counts.tokens += len(ids)
            held.setdefault(key, []).append(ids)
            num_held += len(ids)
            if num_held >= _HELD_TOKENS:
                write()
        write()
    temporary.replace(tokens)
    index = {
        "streams": [[*key, dataclasses.asdict(stream)] for key, stream in streams.items()],
        "problems": problems,
        "lost": lost,
    }
    temporary.write_text(json.dumps(index), "utf-8")
    temporary.replace(tokens.with_suffix(".json"))


def _key(document: Document, settings: Settings) -> _Key:
    split: Split = split_of(document.text, settings.validation_fraction)
    bucket = bucket_of(document.score, settings.quality_buckets)
    return document.source, bucket, weight_level(document.weight, document.text), split


_Streams = dict[_Key, list[tuple[int, _Stream]]]
"""(Unit, stream) of each key, in order."""


def _read_units(folder: Path, units: Sequence[_Unit], problems: list[str]) -> tuple[_Streams, list[str], int]:
    """The streams of all units, the problems (those of whole files first), and the number of lost documents."""
    streams: _Streams = {}
    problems, lost = list(problems), len(problems)
    for unit in units:
        index = json.loads(_unit_file(folder, unit.index, "json").read_bytes())
        for source, bucket, level, split, fields in index["streams"]:
            stream = _Stream(TextCounts(**fields.pop("counts")), **fields)
            streams.setdefault((source, bucket, level, split), []).append((unit.index, stream))
        problems += index["problems"]
        lost += index["lost"]
    return streams, problems, lost


# ---------------------------------------------------------------------------------------------------------------- parts


def _pack_part(job: _Job, task: tuple[str, dict[Split, list[tuple[int, _Stream]]]]) -> None:
    path, streams = task
    out = job.folder / "parts" / path
    if (out / MANIFEST).is_file():
        return
    settings, tokenizer = job.settings, job.tokenizer
    temporary = job.folder / f"part-{uuid.uuid4().hex}"
    temporary.mkdir()
    splits: dict[Split, SplitInfo] = {}
    for split, found in streams.items():
        writer = RowWriter(temporary, split, settings.sequence_length, settings.rows_per_file)
        for unit, stream in found:
            with _unit_file(job.folder, unit, "tokens").open("rb") as file:
                for start, count in stream.chunks:
                    for first in range(start, start + count, _READ_TOKENS):
                        size = min(_READ_TOKENS, start + count - first)
                        writer.add(np.fromfile(file, "<u4", size, offset=4 * first - file.tell()))
        splits[split] = writer.close(_sum_counts(found), tokenizer.pad_id)
    empty = sum(stream.empty_documents for found in streams.values() for _, stream in found)
    manifest = make_manifest(
        tokenizer, settings.sequence_length, settings.validation_fraction, splits, empty_documents=empty,
        invalid_documents=0,
    )  # fmt: skip
    write_manifest(temporary, manifest)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(out)


def _sum_counts(found: Iterable[tuple[int, _Stream]]) -> TextCounts:
    counts = [dataclasses.astuple(stream.counts) for _, stream in found]
    return TextCounts(*map(sum, zip(*counts, strict=True))) if counts else TextCounts()


def _describe(
    folder: Path, settings: Settings, tokenizer: Tokenizer, scans: Sequence[ScannedFile], streams: _Streams,
    parts: Mapping[Part, str], empty: int, lost: int,
) -> Corpus:  # fmt: skip
    rows = []
    for (source, bucket, level), path in parts.items():
        train = load_manifest(folder / "parts" / path).train
        edges = bucket / settings.quality_buckets, (bucket + 1) / settings.quality_buckets
        counts = train.documents, train.tokens, train.rows
        rows.append(CorpusPart(path, source, bucket, *edges, *counts, 2.0**level, share=0.0))
    total = math.fsum(part.tokens * part.mean_weight for part in rows) or 1.0
    documents = sum(s.counts.documents + s.empty_documents for found in streams.values() for _, s in found)
    return Corpus(
        sequence_length=settings.sequence_length,
        quality_buckets=settings.quality_buckets,
        validation_fraction=settings.validation_fraction,
        tokenizer_sha256=tokenizer.fingerprint,
        documents=documents + lost,
        empty_documents=empty,
        invalid_documents=lost,
        parts=tuple(dataclasses.replace(part, share=part.tokens * part.mean_weight / total) for part in rows),
        files=tuple(InputFile(scan.path, scan.size, scan.sha256) for scan in scans),
    )
