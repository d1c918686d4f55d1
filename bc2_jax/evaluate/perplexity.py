"""How well a model predicts texts: nats per token and bits per byte, by file and by language.

Every token is predicted once, the first one after the prefix token; long texts are scored in windows (`Scorer.roll`). A
figure is a sum over texts divided by a sum over texts, so long texts count more. Its standard error is over texts,
which are assumed to be independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bc2_jax.data.documents import Fields, why_no_text
from bc2_jax.data.records import Invalid, read_records
from bc2_jax.data.text_files import TextFile
from bc2_jax.evaluate.records import finite

if TYPE_CHECKING:
    from bc2_jax.evaluate.scorer import Scorer

UNKNOWN = "unknown"  # language of texts without one
_BATCH_CHARACTERS = 1 << 20


class Text(NamedTuple):
    """A text to measure."""

    text: str
    file: str
    language: str  # "" if unknown


class Measured(NamedTuple):
    """The score of a text."""

    file: str
    language: str
    log_prob: float  # nats, of all tokens
    tokens: int
    bytes: int  # UTF-8


class Ratio(NamedTuple):
    value: float  # nan for no texts
    stderr: float  # standard error over texts; nan for fewer than two


class Group(NamedTuple):
    """The figures of some texts."""

    name: str
    texts: int
    tokens: int
    bytes: int
    log_prob: float
    nats_per_token: Ratio
    bits_per_byte: Ratio

    @property
    def perplexity(self) -> float:
        """Per token; inf on overflow."""
        value = self.nats_per_token.value
        return math.exp(value) if not value > 700 else math.inf

    def as_json(self) -> dict[str, Any]:
        """null for nan and inf."""
        figures: dict[str, Any] = {
            **self._asdict(),
            "nats_per_token": self.nats_per_token.value,
            "bits_per_byte": self.bits_per_byte.value,
            "nats_per_token_stderr": self.nats_per_token.stderr,
            "bits_per_byte_stderr": self.bits_per_byte.stderr,
            "perplexity": self.perplexity,
        }
        return dict(finite(figures))


def read_texts(file: TextFile, fields: Fields, language: str = "") -> Iterator[Text | str]:
    """The texts of a .jsonl, .json, .parquet or .txt file, compressed or not; a sentence for each unreadable one.

    Their language is the record's, else `language`. Raises ValueError, naming the extra, if a format's package is
    missing.
    """
    field = "text" if file.kind == "text" else fields.text
    for record in read_records(file.path, file.name):
        if isinstance(record, Invalid):
            yield str(record)
        elif reason := why_no_text(record.value, field):
            yield f"{record.where}: {reason}"
        else:
            said = record.value.get("language")
            yield Text(record.value[field], file.name, said if isinstance(said, str) and said else language)


def measure(
    scorer: Scorer, texts: Iterable[Text], *, stride: int | None = None,
    identify: Callable[[list[str], list[str]], list[str]] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Measured]:  # fmt: skip
    """Scores `texts` in their order, about a million characters at a time.

    `stride`: tokens by which windows advance, by default their length (`Scorer.roll`). `identify(texts, languages)`
    returns the language of each text; by default it is the given one. `progress` gets the texts and bytes done.
    """
    done: list[Measured] = []
    for batch in _batches(texts):
        contents, languages = [text.text for text in batch], [text.language for text in batch]
        if identify is not None:
            languages = identify(contents, languages)
        scores = scorer.roll(contents, stride)
        done += [
            Measured(text.file, language or UNKNOWN, score.log_prob, score.tokens, score.bytes)
            for text, language, score in zip(batch, languages, scores, strict=True)
        ]
        if progress is not None:
            progress(len(done), sum(one.bytes for one in done))
    return done


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def make_group(name: str, measured: Sequence[Measured]) -> Group:
    """The figures of some texts together."""
    losses = [-one.log_prob for one in measured]
    tokens, sizes = [one.tokens for one in measured], [one.bytes for one in measured]
    bits = [loss / math.log(2) for loss in losses]
    return Group(
        name, len(measured), sum(tokens), sum(sizes), -math.fsum(losses), ratio(losses, tokens), ratio(bits, sizes)
    )


def group_by(measured: Sequence[Measured], field: str) -> list[Group]:
    """A group for each value of `field` ("file" or "language"), in order of appearance."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(getattr(one, field), []).append(one)
    return [make_group(name, members) for name, members in groups.items()]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """sum(numerators) / sum(denominators), with the standard error of a ratio of means (linearised)."""
    total, count = math.fsum(denominators), len(numerators)
    if total == 0:
        return Ratio(math.nan, math.nan)
    value = math.fsum(numerators) / total
    if count < 2:
        return Ratio(value, math.nan)
    spread = math.fsum((n - value * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    return Ratio(value, math.sqrt(spread * count / (count - 1)) / total)
