"""A benchmark as data: its examples, their prompts, and the metrics of its results."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Kind = Literal["letters", "options", "generation", "code"]
Drop = Literal["first", "last", "longest"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """An item to ask; its prompt is header + shots + question, separators included."""

    id: str  # stable and unique in its task
    group: str  # subject or category
    question: str
    header: str = ""
    shots: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    """Continuations of the prompt: letters as the shots show them (" A" or "A"), or options. () to generate."""
    bare: tuple[str, ...] = ()  # for letters: the same without the space before them ("A")
    lengths: tuple[int, ...] = ()
    """For options: characters of each without its delimiter; acc_norm divides by them."""
    gold: tuple[int, ...] = ()
    """Indices of `choices`, any of which is right. () if the answer is not published."""
    target: str = ""  # for generation: the reference
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else judging needs (tests, entry point, ...): JSON-able."""
    drop: Drop = "first"
    """Which shots to drop if the prompt is too long; "longest": all of the greatest length."""
    prompt_limit: int | None = None  # tokens of a prompt in the official protocol, if it limits them

    @property
    def prompt(self) -> str:
        return self.header + "".join(self.shots) + self.question


class Fitted(NamedTuple):
    """A prompt after dropping shots until it fits."""

    text: str
    dropped: int  # number of dropped shots
    header_dropped: bool
    fits: bool  # false if the question alone is too long: the caller must truncate it


def fit_shots(example: Example, room: int, count: Callable[[str], int]) -> Fitted:
    """The prompt of `example` in at most min(room, example.prompt_limit) tokens, by dropping whole shots.

    Without shots left, the header is dropped too. `count` returns the tokens of a text.
    """
    limit = min(room, example.prompt_limit or room)
    shots = list(example.shots)

    def text() -> str:
        return example.header + "".join(shots) + example.question

    while shots and count(text()) > limit:
        if example.drop == "longest":
            sizes = [count(shot) for shot in shots]
            shots = [shot for shot, size in zip(shots, sizes, strict=True) if size < max(sizes)]
        else:
            shots.pop(0 if example.drop == "first" else -1)
    dropped = len(example.shots) - len(shots)
    if shots or not example.header or count(text()) <= limit:
        return Fitted(text(), dropped, False, bool(shots) or count(text()) <= room)
    return Fitted(example.question, dropped, True, count(example.question) <= room)


class Loaded(NamedTuple):
    """The content of a benchmark's files."""

    examples: list[Example]
    left_out: Mapping[str, int] = _NOTHING  # reason -> number of items that the protocol leaves out
    notes: tuple[str, ...] = ()  # sentences to print with the figures


class Verdict(NamedTuple):
    right: bool
    answer: str  # the extracted answer, "" if there is none


class Judged(NamedTuple):
    """An example and how it was answered."""

    example: Example
    right: Mapping[str, bool]
    """Way of scoring -> right or wrong, the leading way first; {} if the answer is not published.

    letters: "as_shown", "bare"; options: "acc", "acc_norm"; generation: "exact"; code: "pass@1".
    """
    answer: str  # the letter, option or extracted answer of the leading way
    text: str = ""  # the generated text


class Metric(NamedTuple):
    """A figure in percent or BLEU points, as in the paper's tables."""

    value: float
    stderr: float  # standard error, nan if unknown
    items: int


def mean_of_items(right: Sequence[bool]) -> Metric:
    """The percentage that is right, with the standard error of a mean of independent items."""
    n = len(right)
    share = sum(right) / n if n else math.nan
    return Metric(100 * share, 100 * math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan, n)


def mean_of_groups(right: Mapping[str, Sequence[bool]]) -> Metric:
    """The mean of the groups' percentages; its standard error is that of sampling items within these groups.

    A group of one item has no spread: that of all items is used instead.
    """
    everything = mean_of_items([one for items in right.values() for one in items])
    spread = everything.stderr * math.sqrt(everything.items)
    means = [mean_of_items(items) for items in right.values()]
    return mean_of_metrics([mean._replace(stderr=spread) if mean.items == 1 else mean for mean in means])


def mean_of_metrics(means: Sequence[Metric]) -> Metric:
    """The unweighted mean of independent figures."""
    if not means:
        return Metric(math.nan, math.nan, 0)
    value = sum(mean.value for mean in means) / len(means)
    return Metric(value, math.hypot(*(mean.stderr for mean in means)) / len(means), sum(mean.items for mean in means))


def by_group(judged: Sequence[Judged], way: str) -> dict[str, list[bool]]:
    """Group -> right or wrong of each of its items, groups in order of appearance."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        groups[one.example.group].append(one.right[way])
    return dict(groups)


def summarize(judged: Sequence[Judged]) -> dict[str, Metric]:
    """For each way of scoring the mean over items ("WAY") and over groups ("WAY, mean of groups").

    Items without a published answer are skipped.
    """
    known = [one for one in judged if one.right]
    metrics = {}
    for way in known[0].right if known else ():
        groups = by_group(known, way)
        metrics[way] = mean_of_items([one for items in groups.values() for one in items])
        if len(groups) > 1:
            metrics[f"{way}, mean of groups"] = mean_of_groups(groups)
    return metrics


def groups_first(judged: Sequence[Judged]) -> dict[str, Metric]:
    """`summarize` with the mean over groups first, for benchmarks that report it."""
    metrics = summarize(judged)
    return {name: metrics[name] for way in metrics for name in (f"{way}, mean of groups", way) if name in metrics}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    title: str
    source: str  # what to download: a sentence with the names and the format of the files
    kind: Kind
    shots: int
    load: Callable[[Path], Loaded]
    """Reads the released files in a folder, or in its subfolder with the task's name.

    Raises FileNotFoundError or ValueError with one sentence: the file, what is expected there and in which format."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """"7B", "13B" -> the base model's figure in the paper, in the unit of Metric."""
    paper_source: str = ""  # the table, and the metric of `summarize` that it compares with
    unit: Literal["percent", "points"] = "percent"
    """Of the metrics: percent of items, or points of a corpus measure such as BLEU."""
    notes: tuple[str, ...] = ()  # differences from the paper and what it leaves open: printed with the table
    summarize: Callable[[Sequence[Judged]], dict[str, Metric]] = summarize
    """The first metric is compared with the paper's figure."""
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
    judge: Callable[[Example, str], Verdict] | None = None
    """generation: judges the generated text, cut at the stops. None: the user supplies a judge."""
    program: Callable[[Example, str], tuple[str, str]] | None = None
    """code: (program, tests) in Python, run in sequence; the tests fail unless the generated text is right."""
    submission: Callable[[Sequence[Judged]], Any] | None = None
    """The predictions in the format of the benchmark's site (JSON-able), if it keeps the answers."""
