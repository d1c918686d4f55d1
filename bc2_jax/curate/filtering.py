"""The filter stage: blocks that judge each document by itself, then the features by which documents are compared.

A block is a small object with `run(documents)`. It may change texts, drop documents, set scores and add counts. Every
block sees all documents of a shard, also those that an earlier block dropped: the first block that drops a document
names the reason.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import minhash, safety
from bc2_jax.curate.config import CurationConfig, QualityConfig
from bc2_jax.curate.cuts import BoilerplateConfig, SentenceConfig, low_quality_spans, remove_boilerplate
from bc2_jax.curate.engine import Result, Run, Runner, Stage
from bc2_jax.curate.features import DocumentFrequencies, HashedNgrams, make_perplexity
from bc2_jax.curate.heuristics import HeuristicsConfig, examine
from bc2_jax.curate.normalization import large_strings
from bc2_jax.curate.privacy import KINDS, PrivacyConfig, mask_personal
from bc2_jax.curate.quality import QualityModel
from bc2_jax.curate.safety import SafetyConfig
from bc2_jax.curate.shards import Account, binary_rows, decisions_for, text_sizes
from bc2_jax.curate.spam import SpamConfig, find_spam
from bc2_jax.curate.spans import cut_spans
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.tokens import Tokens, choose_tokens, hash_tokens, token_pieces, without_first
from bc2_jax.files import file_sha256
from bc2_jax.validation import require

_SETTINGS = ("privacy", "boilerplate", "heuristics", "spam", "sentences", "quality", "safety", "embedding")
# Document frequencies are counted in a few shards, and in a few documents of each, evenly spaced.
_COUNTED_SHARDS, _COUNTED_DOCUMENTS = 8, 256


class _Cut(NamedTuple):
    """A piece of text cut out of a document."""

    stage: str
    document: int
    reason: str
    text: str


class Documents:
    """The documents of a shard on their way through the blocks."""

    def __init__(self, table: pa.Table, account: Account) -> None:
        self.table, self.account = table, account
        self.languages: list[str] = table["language"].to_pylist()
        self.texts: list[str] = table["text"].to_pylist()
        self.dropped = np.zeros(table.num_rows, bool)
        self.scores = np.zeros(table.num_rows, np.float32)
        self.audit: pa.Table | None = None
        """Findings of the safety block."""
        self.counts: dict[str, Any] = {}
        """Counts for the report by name."""
        self._cuts: list[_Cut] = []
        self._lost = {stage: np.zeros(table.num_rows, np.int64) for stage in ("quality", "heuristics")}

    @functools.cached_property
    def tokens(self) -> Tokens:
        """Hashed tokens of the texts as they are at the first call: with lines cut and sentences not yet."""
        return hash_tokens(self.texts)

    def replace(self, stage: str, texts: Sequence[str]) -> None:
        """Sets new texts and counts the bytes that they are shorter for `stage`."""
        for place, (old, new) in enumerate(zip(self.texts, texts, strict=True)):
            if new is not old:
                self._lost[stage][place] += len(old.encode()) - len(new.encode())
        self.texts = list(texts)

    def note_cut(self, stage: str, document: int, reason: str, text: str) -> None:
        """Lists a piece cut out of a document; it is written if the document stays."""
        self._cuts.append(_Cut(stage, document, reason, text))

    def drop(self, stage: str, places: Iterable[int], reasons: Iterable[str], size: int | None = None) -> None:
        """Drops the documents at `places` that no block dropped before; `size` as in `Account.note`."""
        new = [(place, reason) for place, reason in zip(places, reasons, strict=True) if not self.dropped[place]]
        self.dropped[[place for place, _ in new]] = True
        # Counted in bytes of the text that was read: a document takes its lines and sentences with it.
        self.account.note(self.table, stage, np.array([p for p, _ in new], int), [reason for _, reason in new], size)

    def drop_found(self, stage: str, reasons: Sequence[str | None]) -> None:
        """Drops the documents that have a reason."""
        places = [place for place, reason in enumerate(reasons) if reason is not None]
        self.drop(stage, places, [reasons[place] or "" for place in places])

    def finish(self) -> pa.Table:
        """The table of the documents that stay, with their new texts and scores; completes the account."""
        for stage, lost in self._lost.items():
            self.account.count(stage, 0, int(lost[~self.dropped].sum()))
        texts = large_strings(self.texts)
        emptied = np.flatnonzero(~self.dropped & (pc.binary_length(texts).to_numpy() == 0))
        self.drop("heuristics", emptied, ["nothing is left of its lines and sentences"] * len(emptied), size=0)
        for stage in ("heuristics", "quality"):
            cuts = [cut for cut in self._cuts if cut.stage == stage and not self.dropped[cut.document]]
            _, places, reasons, pieces = zip(*cuts, strict=True) if cuts else ((),) * 4
            self.account.note_cuts(self.table, stage, places, reasons, pieces)
        columns = self.table.drop_columns(["text"])
        columns = columns.append_column("score", pa.array(self.scores.astype(np.float32)))
        return columns.append_column("text", texts).filter(pa.array(~self.dropped))


class Block(Protocol):
    """One rule or change of documents."""

    def run(self, documents: Documents) -> None: ...


@dataclasses.dataclass(frozen=True)
class MaskPersonalData:
    """Replaces personal numbers and addresses by placeholders."""

    config: PrivacyConfig

    def run(self, documents: Documents) -> None:
        counts = [0] * len(KINDS)
        if self.config.enabled:
            masked = mask_personal(documents.texts, documents.languages, self.config)
            documents.replace("heuristics", masked.texts)
            counts = masked.counts.sum(axis=0).tolist()
        documents.counts["masked"] = dict(zip(KINDS, counts, strict=True))


@dataclasses.dataclass(frozen=True)
class CutBoilerplate:
    """Cuts out whole lines that belong to a web site and not to its text."""

    config: BoilerplateConfig

    def run(self, documents: Documents) -> None:
        texts, lines = remove_boilerplate(documents.texts, documents.languages, self.config)
        documents.replace("heuristics", texts)
        for line in lines:
            documents.note_cut("heuristics", line.document, "boilerplate", line.text)
        documents.counts["boilerplate_lines"] = len(lines)


@dataclasses.dataclass(frozen=True)
class Heuristics:
    """Drops documents that break a limit on counts; the distance from the limits is the score without a model."""

    config: HeuristicsConfig

    def run(self, documents: Documents) -> None:
        verdicts = examine(documents.texts, documents.languages, self.config, documents.tokens)
        documents.scores = verdicts.scores
        documents.drop_found("heuristics", verdicts.reasons)


@dataclasses.dataclass(frozen=True)
class Spam:
    """Drops advertising, rows of search terms and menus."""

    config: SpamConfig

    def run(self, documents: Documents) -> None:
        reasons = find_spam(documents.texts, documents.languages, self.config, documents.tokens)
        documents.drop_found("heuristics", reasons)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Scores documents by a trained model, if there is one, and drops low scores."""

    config: QualityConfig

    def run(self, documents: Documents) -> None:
        config = self.config
        if config.model is not None:
            perplexity = None
            if config.language_model is not None:
                perplexity = make_perplexity(config.language_model, config.max_tokens)
            model = _load_model(config.model, file_sha256(config.model))
            documents.scores = model.score(documents.texts, documents.tokens, perplexity)
        low = np.flatnonzero(documents.scores < config.min_score)
        documents.drop("quality", low, [f"score = {documents.scores[i]:.3f}, limit {config.min_score}" for i in low])


@dataclasses.dataclass(frozen=True)
class Safety:
    """Drops or reports harmful documents, and writes every finding to the audit log."""

    config: SafetyConfig

    def run(self, documents: Documents) -> None:
        harmful, findings = safety.find_harmful(documents.texts, self.config, documents.tokens)
        if self.config.action == "drop":
            first = {finding.document: finding for finding in reversed(findings)}
            found = [first[place] for place in np.flatnonzero(harmful).tolist()]
            reasons = [f"{finding.category}: {finding.keyword or finding.score}" for finding in found]
            documents.drop("safety", [finding.document for finding in found], reasons)
        documents.audit = safety.audit_table(findings, documents.table["doc"].to_numpy())
        documents.counts["findings"] = len(findings)


@dataclasses.dataclass(frozen=True)
class CutSentences:
    """Cuts sentences that are not language out of the documents that stay."""

    config: SentenceConfig

    def run(self, documents: Documents) -> None:
        texts, changed = list(documents.texts), 0
        for place, spans in enumerate(low_quality_spans(texts, documents.languages, self.config)):
            if not spans or documents.dropped[place]:
                continue
            changed += 1
            text = texts[place]
            texts[place] = cut_spans(text, *zip(*spans, strict=True))
            for start, stop in spans:
                documents.note_cut("quality", place, "a low-quality sentence", text[start:stop])
        documents.replace("quality", texts)
        documents.counts["cut_sentences_in"] = changed


@dataclasses.dataclass(frozen=True)
class Filter(Stage):
    """Drops exact copies, runs the blocks, and writes the features of the documents that stay."""

    blocks: Sequence[Block]
    name = "filter"

    def settings(self, config: CurationConfig) -> Any:
        paths = [config.quality.model, config.safety.model, *(file.path for file in config.safety.keywords)]
        values = {name: dataclasses.asdict(getattr(config, name)) for name in _SETTINGS}
        hashes = [file_sha256(path) for path in paths if path is not None]
        return values | {"files": hashes, "language_model": model_state(config.quality.language_model)}

    def run(self, runner: Runner) -> list[Result]:
        sketch = None
        if not runner.config.embedding.model:
            sketch = HashedNgrams(runner.config.embedding, _count_frequencies(runner))
        return runner.map(functools.partial(self._filter, sketch), runner.shards)

    def _filter(self, sketch: HashedNgrams | None, run: Run, name: str) -> Result:
        """Filters one shard."""
        folder = run.work / self.name
        table = (run.work / "read" / "shards").read_table(f"{name}.parquet").drop_columns(["h1", "h2", "id_hash"])
        account = Account(table)
        copies = decisions_for(run.work / "exact" / "decisions", name)
        documents = Documents(account.drop_copies(table, "exact", copies, "the same text"), account)
        for block in self.blocks:
            block.run(documents)
        table = documents.finish()
        (folder / "audit").write_table(f"{name}.parquet", documents.audit)
        (folder / "shards").write_table(f"{name}.parquet", table)
        (folder / "removed").write_table(f"{name}.parquet", account.removed)
        (folder / "cuts").write_table(f"{name}.parquet", account.cuts)
        # Features are those of the text before sentences were cut out, because its tokens are known.
        _write_features(folder, name, table, choose_tokens(documents.tokens, ~documents.dropped), sketch)
        return account.result(table) | documents.counts


def check_files(config: CurationConfig) -> None:
    """Raises ValueError if a file or a folder that the settings name is missing or invalid."""
    named = [("quality.model", config.quality.model), ("safety.model", config.safety.model)]
    named += [("contamination.files", file) for file in config.contamination.files]
    for field, path in named:
        require(path is None or Path(path).is_file(), field, path, "it must be a file")
    for field, path in (
        ("quality.language_model", config.quality.language_model),
        ("embedding.model", config.embedding.model),
    ):
        require(not path or Path(path).is_dir(), field, path, "it must be a folder")
    for path in (config.quality.model, config.safety.model):
        if path is not None:
            QualityModel.load(path)
    if config.safety.keywords:
        safety.KeywordMatcher.read(config.safety)


def model_state(path: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model, which is too large to hash at each start."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if path else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@functools.lru_cache(maxsize=4)
def _load_model(path: str, _sha256: str) -> QualityModel:
    return QualityModel.load(path)


def _count_frequencies(runner: Runner) -> DocumentFrequencies:
    """In how many documents each hashed n-gram occurs, estimated from a few shards."""
    names = runner.shards
    some = [names[i] for i in _spaced(len(names), _COUNTED_SHARDS)]
    counted = runner.map(_count_words, some, suffix="-words")
    files = [(runner.folder / "frequencies").read(f"{name}.i8") for name in some]
    counts = np.sum([np.frombuffer(file, "<i8") for file in files], axis=0)
    return DocumentFrequencies(counts, sum(result["documents"] for result in counted))


def _count_words(run: Run, name: str) -> Result:
    """Document frequencies of hashed tokens in some documents of a shard."""
    texts = (run.work / "read" / "shards").read_table(f"{name}.parquet", ["text"])["text"]
    sample = pa.array(_spaced(len(texts), _COUNTED_DOCUMENTS))
    frequencies = DocumentFrequencies.of(texts.take(sample).to_pylist())
    (run.work / "filter" / "frequencies").write(f"{name}.i8", frequencies.counts.astype("<i8").tobytes())
    return {"documents": frequencies.documents}


def _spaced(size: int, most: int) -> np.ndarray:
    """int64: at most `most` of the numbers 0..size - 1, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(most, size), dtype=np.int64))


def _write_features(folder: Folder, name: str, table: pa.Table, tokens: Tokens, sketch: HashedNgrams | None) -> None:
    """Writes the MinHash signatures, the keys of their bands and, with `sketch`, the dense features.

    `tokens` are those of the documents of `table`. Licence headers are left out.
    """
    tokens = without_first(tokens, minhash.header_tokens(table["text"].to_pylist()))
    signed, sketched = [np.empty((0, minhash.VALUES), np.uint32)], []
    for _, piece in token_pieces(tokens):
        signed.append(minhash.signatures(piece))
        if sketch is not None:
            sketched.append(sketch.sketch(piece))
    signature = np.concatenate(signed)
    columns = table.select(["doc", "source", "language", "score"]).append_column("bytes", text_sizes(table))
    columns = columns.append_column("signature", binary_rows(signature))
    if sketch is not None:
        features = np.concatenate([np.empty((0, sketch.config.dim), np.float16), *sketched])
        columns = columns.append_column("feature", binary_rows(features))
    (folder / "features").write_table(f"{name}.parquet", columns)
    index, keys = minhash.bands(signature)
    order = np.argsort(keys, kind="stable")
    bands = pa.table({"key": keys[order], "doc": table["doc"].to_numpy()[index[order]]})
    (folder / "bands").write_table(f"{name}.parquet", bands)
