"""What a benchmark is, as data: its examples, how their prompts are put together, and how results become figures."""

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
    """An item, ready to be asked: the prompt is header + shots + question; what separates them is in these parts."""

    id: str
    """Stable and unique in its task."""
    group: str
    """Subject or category."""
    header: str
    shots: tuple[str, ...]
    question: str
    choices: tuple[str, ...] = ()
    """Continuations of the prompt: letters as the shots show them (" A" or "A"), or whole options. () to generate."""
    bare: tuple[str, ...] = ()
    """For letters: the same without what comes before them in the shots ("A")."""
    lengths: tuple[int, ...] = ()
    """For options: characters of each without what delimits it from the question; acc_norm divides by them."""
    gold: tuple[int, ...] = ()
    """Indices of `choices`, any of which counts as right. () if the answer is not published."""
    target: str = ""
    """For generation: the reference."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else judging needs (tests, entry point, ...): JSON-able."""
    drop: Drop = "first"
    """Which shots go when the prompt does not fit; "longest": all that have the length of the longest."""
    prompt_limit: int | None = None
    """Tokens of a prompt in the official protocol, where it sets a limit below the model's."""

    @property
    def prompt(self) -> str:
        return self.header + "".join(self.shots) + self.question


class Fitted(NamedTuple):
    """A prompt after as many shots were dropped as it takes."""

    text: str
    dropped: int
    """Shots left out."""
    header_dropped: bool
    fits: bool
    """False if even the question alone is longer than the room: who asks it must cut it."""


def fit_shots(example: Example, room: int, count: Callable[[str], int]) -> Fitted:
    """The prompt of `example` in at most `room` tokens, and in at most `example.prompt_limit`; shots go as a whole.

    Without any shot the header goes too if need be. `count` gives the tokens of a text.
    """
    limit = min(room, example.prompt_limit or room)
    shots = list(example.shots)
    tail = example.question

    def text() -> str:
        return example.header + "".join(shots) + tail

    while shots and count(text()) > limit:
        if example.drop == "longest":
            sizes = [count(shot) for shot in shots]
            shots = [shot for shot, size in zip(shots, sizes, strict=True) if size < max(sizes)]
        else:
            shots.pop(0 if example.drop == "first" else -1)
    dropped = len(example.shots) - len(shots)
    if shots or not example.header or count(text()) <= limit:
        return Fitted(text(), dropped, False, bool(shots) or count(text()) <= room)
    return Fitted(tail, dropped, True, count(tail) <= room)


class Loaded(NamedTuple):
    """What a benchmark's files hold."""

    examples: list[Example]
    left_out: Mapping[str, int] = _NOTHING
    """Reason -> items of the files that the protocol leaves out."""
    notes: tuple[str, ...] = ()
    """What was found about the files and should be read with the figures: sentences."""


class Verdict(NamedTuple):
    right: bool
    answer: str
    """What was taken for the answer, "" if there is none."""


class Judged(NamedTuple):
    """An example and how it was answered."""

    example: Example
    right: Mapping[str, bool]
    """Way of scoring -> right or wrong, the leading way first; {} if the answer is not published.

    letters: "as_shown", "bare"; options: "acc", "acc_norm"; generation: "exact"; code: "pass@1".
    """
    answer: str
    """The letter, the option or the extracted answer of the leading way."""
    text: str = ""
    """What was generated."""


class Metric(NamedTuple):
    """A figure in the unit of the paper's tables: percent, or points of BLEU."""

    value: float
    stderr: float
    """Standard error, nan where it is not known."""
    items: int
    """How many it is made of."""


def mean_of_items(right: Sequence[bool]) -> Metric:
    """The share that is right, with the standard error of a mean of independent items."""
    n = len(right)
    share = sum(right) / n if n else math.nan
    return Metric(100 * share, 100 * math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan, n)


def mean_of_groups(right: Mapping[str, Sequence[bool]]) -> Metric:
    """The mean of the groups' shares; its standard error is that of sampling items within these groups.

    A group of one item says nothing of its spread: that of all items takes its place.
    """
    everything = mean_of_items([one for items in right.values() for one in items])
    spread = everything.stderr * math.sqrt(everything.items)
    means = [mean_of_items(items) for items in right.values()]
    return mean_of_metrics([mean._replace(stderr=spread) if mean.items == 1 else mean for mean in means])


def mean_of_metrics(means: Sequence[Metric]) -> Metric:
    """Of independent figures, each of the same weight."""
    if not means:
        return Metric(math.nan, math.nan, 0)
    value = sum(mean.value for mean in means) / len(means)
    return Metric(value, math.hypot(*(mean.stderr for mean in means)) / len(means), sum(mean.items for mean in means))


def by_group(judged: Sequence[Judged], way: str) -> dict[str, list[bool]]:
    """Group -> right or wrong of each of its items, in the order in which the groups appear."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        groups[one.example.group].append(one.right[way])
    return dict(groups)


def summarize(judged: Sequence[Judged]) -> dict[str, Metric]:
    """Of each way of scoring: the mean over items, under its name, and that over groups ("WAY, mean of groups").

    Items whose answer is not published are left out; without any other there is no figure.
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
    """`summarize` for benchmarks whose figure is the mean over subjects: of each way, that one first."""
    metrics = summarize(judged)
    return {name: metrics[name] for way in metrics for name in (f"{way}, mean of groups", way) if name in metrics}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    title: str
    source: str
    """What to download: a sentence with the names and the format of the files."""
    kind: Kind
    shots: int
    load: Callable[[Path], Loaded]
    """Reads the released files below a folder, which holds them or a folder of them that has the task's name.

    Raises FileNotFoundError or ValueError with one sentence: the file, what is expected there and in which format."""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """"7B", "13B" -> the base model's figure in the paper, in the unit of Metric; only those that it prints."""
    paper_source: str = ""
    """Which table, and which metric of `summarize` it compares with."""
    unit: Literal["percent", "points"] = "percent"
    """Of the metrics: percent of items, or points of a measure of all of them together, such as BLEU."""
    notes: tuple[str, ...] = ()
    """What the paper leaves open, what differs from it: printed with the table."""
    summarize: Callable[[Sequence[Judged]], dict[str, Metric]] = summarize
    """The first metric is the one beside the paper's figure."""
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
    judge: Callable[[Example, str], Verdict] | None = None
    """generation: of the text that was generated, cut at the stops. None: a judge that the user gives."""
    program: Callable[[Example, str], tuple[str, str]] | None = None
    """code: (program, tests) in Python, to be run one after the other, of which the tests fail unless the text that was
    generated is right."""
    submission: Callable[[Sequence[Judged]], Any] | None = None
    """The predictions as the benchmark's site takes them (JSON-able), where it keeps the answers."""
