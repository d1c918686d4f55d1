"""How well a model predicts texts: nats a token and bits a byte, by file and by language.

Every token of a text is predicted exactly once, the first one after the prefix token; texts longer than the model's
context in windows (`Scorer.roll`). A figure is a sum over texts divided by a sum over texts, so long texts count more,
and its standard error is that of drawing the texts, which are taken to be independent; tokens of one text are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from bc2_jax.data.documents import Fields, why_no_text
from bc2_jax.data.records import Invalid, read_records
from bc2_jax.data.text_files import TextFile

UNKNOWN = "unknown"
"""The language of texts of which nothing says it."""
_BATCH_CHARACTERS = 1 << 20


class Rolled(Protocol):
    """What is needed of a text's score."""

    @property
    def log_prob(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Roller(Protocol):
    """What is needed of a `Scorer`."""

    def roll(self, texts: Sequence[str], stride: int | None = None) -> Sequence[Rolled]: ...


class Text(NamedTuple):
    """A text to measure."""

    text: str
    file: str
    language: str
    """"" if nothing says it."""


class Measured(NamedTuple):
    """A text after it was measured."""

    file: str
    language: str
    log_prob: float
    """Nats, of all tokens."""
    tokens: int
    bytes: int
    """UTF-8, of the text as it was given."""


class Ratio(NamedTuple):
    value: float
    """nan of nothing."""
    stderr: float
    """Standard error over texts; nan for fewer than two."""


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
        """Of a token; inf where no float holds it."""
        value = self.nats_per_token.value
        return math.exp(value) if not value > 700 else math.inf

    def as_json(self) -> dict[str, Any]:
        """Without nan and inf, which JSON does not have."""
        ratios = {name: ratio for name in ("nats_per_token", "bits_per_byte") for ratio in (getattr(self, name),)}
        figures = {
            "log_prob": self.log_prob,
            **{name: ratio.value for name, ratio in ratios.items()},
            **{f"{name}_stderr": ratio.stderr for name, ratio in ratios.items()},
            "perplexity": self.perplexity,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return {"name": self.name, "texts": self.texts, "tokens": self.tokens, "bytes": self.bytes, **finite}


def read_texts(file: TextFile, fields: Fields, language: str = "") -> Iterator[Text | str]:
    """The texts of a .jsonl, .json, .parquet or .txt file, compressed or not; a sentence in the place of one that
    can't be read.

    Their language is what their record says, else `language`. Raises ValueError, naming the extra, for a format whose
    package is missing.
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
    scorer: Roller, texts: Iterable[Text], *, stride: int | None = None,
    identify: Callable[[list[str], list[str]], list[str]] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Measured]:  # fmt: skip
    """Each of `texts` measured, in their order; so many are held at a time as fill some batches.

    `stride` is the number of tokens by which windows move on, by default as many as they hold (`Scorer.roll`).
    `identify` gives the language of each text, by the text and by what is said about it, "" if nothing; by default it
    is what is said, else UNKNOWN. `progress` is told how many texts and bytes are done.
    """
    identify = identify or say_language
    done: list[Measured] = []
    for batch in _batches(texts):
        languages = identify([text.text for text in batch], [text.language for text in batch])
        scores = scorer.roll([text.text for text in batch], stride)
        done += [
            Measured(text.file, language or UNKNOWN, score.log_prob, score.tokens, score.bytes)
            for text, language, score in zip(batch, languages, scores, strict=True)
        ]
        if progress is not None:
            progress(len(done), sum(one.bytes for one in done))
    return done


def say_language(texts: Sequence[str], said: Sequence[str]) -> list[str]:
    """The language of each text as its record says it."""
    return [language or UNKNOWN for language in said]


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
    """A group for each value of `field` ("file" or "language"), in the order in which they appear."""
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
