"""What a document tells about itself, applied to a shard: personal data, boilerplate, heuristics, quality, safety."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import safety
from bc2_jax.curate.boilerplate import remove_boilerplate
from bc2_jax.curate.config import CurationConfig, QualityConfig
from bc2_jax.curate.embedding import HashedNgrams
from bc2_jax.curate.engine import Task
from bc2_jax.curate.features import write_features
from bc2_jax.curate.heuristics import examine
from bc2_jax.curate.normalization import large_strings
from bc2_jax.curate.privacy import KINDS, mask_personal
from bc2_jax.curate.quality import QualityModel
from bc2_jax.curate.sentences import low_quality_spans
from bc2_jax.curate.shards import Account, decisions_for
from bc2_jax.curate.spam import find_spam
from bc2_jax.curate.spans import cut_spans
from bc2_jax.curate.stages import fingerprint
from bc2_jax.curate.tokens import choose_tokens, hash_tokens
from bc2_jax.files import file_sha256
from bc2_jax.validation import require

if TYPE_CHECKING:
    from bc2_jax.curate.tasks import Run

_PARTS = ("privacy", "boilerplate", "heuristics", "spam", "sentences", "quality", "safety", "embedding")


def check(config: CurationConfig) -> None:
    """Raises ValueError if a file that the run needs is missing or is not what it should be."""
    named = [("quality.model", config.quality.model), ("safety.model", config.safety.model)]
    named += [("contamination.files", file) for file in config.contamination.files]
    for field, path in named:
        require(path is None or Path(path).is_file(), field, path, "it must be a file")
    for field, path in (
        ("quality.language_model", config.quality.language_model),
        ("embedding.model", config.embedding.model),
    ):
        require(not path or Path(path).is_dir(), field, path, "it must be a folder")
    _quality_model(config.quality)
    if config.safety.keywords:
        safety.KeywordMatcher.read(config.safety)
    if config.safety.model is not None:
        QualityModel.load(config.safety.model)


def settings(config: CurationConfig) -> dict[str, Any]:
    """What the result of `filter_documents` depends on: settings and contents of files."""
    paths = [config.quality.model, config.safety.model, *(file.path for file in config.safety.keywords)]
    values = {name: dataclasses.asdict(getattr(config, name)) for name in _PARTS}
    hashes = [file_sha256(path) for path in paths if path is not None]
    return values | {"files": hashes, "language_model": model_state(config.quality.language_model)}


def model_state(path: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model: it is too large to hash for each start."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if path else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


class _Cut(NamedTuple):
    """A piece of text that a document loses: its place in the shard, why, and the piece."""

    stage: str
    document: int
    reason: str
    text: str


def _cut_sentences(
    texts: list[str], languages: Sequence[str], stays: np.ndarray, config: CurationConfig
) -> list[_Cut]:  # fmt: skip
    """Cuts low-quality sentences out of those `texts`, in place, whose document `stays`, bool [D]."""
    cuts = []
    for place, spans in enumerate(low_quality_spans(texts, languages, config.sentences)):
        if spans and stays[place]:
            text = texts[place]
            texts[place] = cut_spans(text, *zip(*spans, strict=True))
            cuts += [_Cut("quality", place, "a low-quality sentence", text[start:stop]) for start, stop in spans]
    return cuts


def filter_documents(run: Run, sketch: HashedNgrams | None, task: Task) -> Task:
    """Drops exact copies and what breaks a rule, cuts out lines and sentences, masks personal data, gives scores.

    Of what stays, the features by which documents are compared are computed while its tokens are there: those of the
    text before sentences were cut out.
    """
    config, name = run.config, task["name"]
    folder = run.work / "filter"
    table = (run.work / "read" / "shards").read_table(f"{name}.parquet").drop_columns(["h1", "h2", "id_hash"])
    account = Account(table)
    table = account.drop_copies(table, "exact", decisions_for(run.work / "exact" / "decisions", name), "the same text")

    # ---------------------------------------------------------------- lines and personal data
    languages = table["language"].to_pylist()
    texts = table["text"].to_pylist()
    masked = mask_personal(texts, languages, config.privacy) if config.privacy.enabled else None
    if masked is not None:
        texts = masked.texts
    texts, lines = remove_boilerplate(texts, languages, config.boilerplate)

    # ---------------------------------------------------------------- rules
    tokens = hash_tokens(texts)
    verdicts = examine(texts, languages, config.heuristics, tokens)
    broken = np.flatnonzero([reason is not None for reason in verdicts.reasons])
    drops = [("heuristics", broken, [verdicts.reasons[i] or "" for i in broken])]
    spam = find_spam(texts, languages, config.spam, tokens)
    found = np.flatnonzero([reason is not None for reason in spam])
    drops.append(("heuristics", found, [spam[i] or "" for i in found]))

    # ---------------------------------------------------------------- quality and safety
    model = _quality_model(config.quality)
    scores = verdicts.scores
    if model is not None:
        scores = model.score(texts, tokens, _perplexity(config.quality))
    low = np.flatnonzero(scores < config.quality.min_score)
    drops.append(("quality", low, [f"score = {scores[i]:.3f}, limit {config.quality.min_score}" for i in low]))
    harmful, findings = safety.find_harmful(texts, config.safety, tokens=tokens)
    if config.safety.action == "drop":
        first = {finding.document: finding for finding in reversed(findings)}
        gone = np.flatnonzero(harmful)
        drops.append(
            ("safety", gone, [f"{first[i].category}: {first[i].keyword or first[i].score}" for i in gone.tolist()])
        )
    audit = safety.audit_table(findings, table["doc"].to_numpy())
    (folder / "audit").write_table(f"{name}.parquet", audit)

    # ---------------------------------------------------------------- sentences of what stays
    stays = np.ones(table.num_rows, bool)
    for _, places, _ in drops:
        stays[places] = False
    before = pc.binary_length(table["text"]).to_numpy()
    before_cut = list(texts)
    cuts = [_Cut("heuristics", line.document, "boilerplate", line.text) for line in lines]
    cuts += _cut_sentences(texts, languages, stays, config)
    cut = [place for place in range(len(texts)) if texts[place] is not before_cut[place]]
    changed = large_strings(texts)
    after = pc.binary_length(changed).to_numpy()
    in_sentences = sum(len(before_cut[place].encode()) - int(after[place]) for place in cut)
    account.count("quality", 0, in_sentences)
    account.count("heuristics", 0, int((before - after)[stays].sum()) - in_sentences)

    # The account is in bytes of the text that was read: a document that goes takes its lines along.
    table = table.append_column("score", pa.array(scores.astype(np.float32)))
    table = table.append_column("changed", changed)
    seen = np.zeros(table.num_rows, bool)
    for stage, places, reasons in drops:
        fresh = [(place, reason) for place, reason in zip(places.tolist(), reasons, strict=True) if not seen[place]]
        seen[[place for place, _ in fresh]] = True
        account.note(table, stage, np.array([place for place, _ in fresh], int), [reason for _, reason in fresh])
    emptied = np.flatnonzero(~seen & (after == 0))
    account.note(table, "heuristics", emptied, ["nothing is left of its lines and sentences"] * len(emptied), size=0)
    seen[emptied] = True
    for stage in ("heuristics", "quality"):
        of_stage = [cut for cut in cuts if cut.stage == stage and not seen[cut.document]]
        account.note_cuts(
            table, stage, [c.document for c in of_stage], [c.reason for c in of_stage], [c.text for c in of_stage]
        )
    table = table.filter(pa.array(~seen)).drop_columns(["text"]).rename_columns({"changed": "text"})
    (folder / "shards").write_table(f"{name}.parquet", table)
    (folder / "removed").write_table(f"{name}.parquet", account.removed)
    (folder / "cuts").write_table(f"{name}.parquet", account.cuts)
    write_features(run, name, table, choose_tokens(tokens, ~seen), sketch)
    counts = masked.counts.sum(axis=0).tolist() if masked is not None else [0] * len(KINDS)
    return account.result(table) | {
        "boilerplate_lines": len(lines),
        "cut_sentences_in": len(cut),
        "masked": dict(zip(KINDS, counts, strict=True)),
        "findings": len(findings),
    }


@functools.lru_cache(maxsize=4)
def _load_model(path: str, _: str) -> QualityModel:
    return QualityModel.load(path)


def _quality_model(config: QualityConfig) -> QualityModel | None:
    return None if config.model is None else _load_model(config.model, fingerprint(file_sha256(config.model)))


@functools.lru_cache(maxsize=1)
def _load_perplexity(path: str, max_tokens: int) -> Any:
    from bc2_jax.curate.perplexity import make_perplexity

    return make_perplexity(path, max_tokens)


def _perplexity(config: QualityConfig) -> Any:
    return None if config.language_model is None else _load_perplexity(config.language_model, config.max_tokens)
