"""Accuracy of a reward model on pairs: overall, by class of the prompt, by gap between the scores of both answers.

The paper reports accuracy by gap (section 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from bc2_jax.align.chat import EncodedPair, encode_pair
from bc2_jax.align.formats import Sample, read_samples
from bc2_jax.align.intervals import wilson_of_share
from bc2_jax.align.pair_rows import SCORE_FIELDS, as_pair, split_pair
from bc2_jax.align.row_preparation import PAIRS
from bc2_jax.align.scoring import Scorer
from bc2_jax.align.taxonomy import LEVELS, Taxonomy
from bc2_jax.data.packing import MANIFEST
from bc2_jax.data.records import Invalid
from bc2_jax.terminal import make_table
from bc2_jax.train.pictures import picture

PAPER_ACCURACY = {1: 0.545, 2: 0.611, 3: 0.702, 4: 0.778, 5: 0.815}
"""By gap."""
CLASS_FIELDS, GAP_FIELDS = ("class", "category"), ("gap",)
"""Default fields of a record with its class and its gap; the first existing one counts. Without a gap it is the
difference of SCORE_FIELDS."""
NO_CLASS, NO_GAP = "no class", "no gap"


@dataclasses.dataclass(frozen=True)
class JudgedPair:
    """Rewards of both answers of a pair, and their lengths in tokens."""

    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    class_name: str | None = None
    """As in the record."""
    gap: float | None = None

    @property
    def outcome(self) -> float:
        """1 if the chosen answer has the higher reward, 0 if the rejected one has, 0.5 at a tie."""
        return _outcome(self.chosen, self.rejected)

    @property
    def longer_wins(self) -> float:
        """`outcome` by length instead of reward."""
        return _outcome(self.chosen_length, self.rejected_length)


def _outcome(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


class Accuracy(NamedTuple):
    """Accuracy on a group of pairs."""

    pairs: int
    ties: int
    """Each is half right."""
    value: float
    low: float
    """Ends of Wilson's 95 % interval."""
    high: float
    longer_wins: float
    """The accuracy of preferring the longer answer."""

    @classmethod
    def of(cls, pairs: Sequence[JudgedPair]) -> Accuracy:
        """The accuracy on at least one pair."""
        right, count = sum(pair.outcome for pair in pairs), len(pairs)
        longer = sum(pair.longer_wins for pair in pairs) / count
        ties = sum(pair.outcome == 0.5 for pair in pairs)
        return cls(count, ties, right / count, *wilson_of_share(right / count, count, z=1.959964), longer)


class Report(NamedTuple):
    """Accuracy and statistics of all pairs."""

    overall: Accuracy
    by_class: dict[int, dict[str, Accuracy]]
    """Level -> id of a class -> accuracy, subclasses included, in the order of the taxonomy."""
    unknown: dict[str, Accuracy]
    """Classes that are not in the taxonomy, as named in the records, and NO_CLASS."""
    by_gap: dict[str, Accuracy]
    """"1", "2", ..., and NO_GAP."""
    lengths: dict[str, float]
    """Mean tokens of `chosen` and `rejected`; `agreement`: how often the longer of two answers has the higher reward;
    `correlation` of the differences of rewards and lengths."""
    rewards: dict[str, float]
    """Mean and standard deviation of chosen, rejected and all answers."""

    def as_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            if isinstance(value, Accuracy):
                return value._asdict()
            return {str(k): plain(v) for k, v in value.items()} if isinstance(value, dict) else value

        paper = {str(gap): value for gap, value in PAPER_ACCURACY.items()}
        return {name: plain(value) for name, value in self._asdict().items()} | {"paper_by_gap": paper}


def read_class(record: Mapping[str, Any], fields: Sequence[str] = CLASS_FIELDS) -> str | None:
    """The class of a record, or None."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:  # a path through the levels
            value = value[-1]
        if isinstance(value, str | int) and str(value).strip():
            return str(value).strip()
    return None


def read_gap(
    record: Mapping[str, Any], fields: Sequence[str] = GAP_FIELDS, scores: Sequence[str] = SCORE_FIELDS
) -> float | None:  # fmt: skip
    """The gap between the scores of both answers: a field, or the difference of two fields; None without numbers."""
    for field in fields:
        if (gap := _number(record.get(field))) is not None:
            return gap
    chosen, rejected = (_number(record.get(field)) for field in scores)
    return None if chosen is None or rejected is None else chosen - rejected


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_pairs(paths: Sequence[Path], limit: int = 0) -> tuple[list[Sample], list[Invalid]]:
    """(preference pairs, unusable records) of files and folders; only the first `limit` pairs if it is not 0.

    Of a folder of packed pairs, the held-out ones. Raises as `formats.read_samples`.
    """
    files = [path / PAIRS if (path / MANIFEST).is_file() else path for path in paths]
    pairs: list[Sample] = []
    invalid: list[Invalid] = []
    for found in map(as_pair, read_samples(files, "PAIRS")):
        if isinstance(found, Invalid):
            invalid.append(found)
        elif len(pairs) < limit or not limit:
            pairs.append(found)
        else:
            break
    return pairs, invalid


def judge(
    scorer: Scorer, samples: Sequence[Sample], class_fields: Sequence[str] = CLASS_FIELDS,
    gap_fields: Sequence[str] = GAP_FIELDS, score_fields: Sequence[str] = SCORE_FIELDS,
) -> tuple[list[JudgedPair], int, int]:  # fmt: skip
    """(pairs with their rewards, number cut to the longest length of the model, number left out).

    Pairs are cut as in training, and left out if an answer is then empty or both are equal. Raises ValueError without a
    tokenizer.
    """
    if scorer.tokenizer is None:
        raise ValueError("The reward model has no tokenizer beside it: put tokenizer.model into the folder of its run.")
    limit, cut = scorer.config.model_max_length, 0
    kept: list[tuple[Sample, EncodedPair]] = []
    for sample in samples:
        pair = encode_pair(scorer.tokenizer, *split_pair(sample), limit, 2 * limit)
        if all(pair.answers) and pair.answers[0] != pair.answers[1]:
            kept.append((sample, pair))
            cut += bool(pair.dropped_rounds or pair.cut_tokens)
    # Consecutive, so that both answers of a pair are mostly in one batch.
    rewards = scorer.score([pair.prompt + answer for _, pair in kept for answer in pair.answers]).reshape(-1, 2)
    judged = [
        JudgedPair(
            float(chosen), float(rejected), len(pair.answers[0]), len(pair.answers[1]),
            read_class(sample.fields, class_fields), read_gap(sample.fields, gap_fields, score_fields),
        )
        for (sample, pair), (chosen, rejected) in zip(kept, rewards, strict=True)
    ]  # fmt: skip
    return judged, cut, len(samples) - len(kept)


def summarize(pairs: Sequence[JudgedPair], taxonomy: Taxonomy) -> Report:
    """The report of at least one pair. Gaps are rounded to whole numbers."""
    by_class: dict[int, dict[str, list[JudgedPair]]] = {level: {} for level in range(1, LEVELS + 1)}
    unknown: dict[str, list[JudgedPair]] = {}
    for pair in pairs:
        found = taxonomy.find(pair.class_name)
        if found is None:
            unknown.setdefault(pair.class_name or NO_CLASS, []).append(pair)
            continue
        for level, name in enumerate(found.path, 1):
            by_class[level].setdefault(name, []).append(pair)
    gaps = _group(pairs, lambda pair: None if pair.gap is None else math.floor(pair.gap + 0.5))
    order = {c.id: i for i, c in enumerate(taxonomy.classes)}
    return Report(
        Accuracy.of(pairs),
        {
            level: {name: Accuracy.of(groups[name]) for name in sorted(groups, key=order.__getitem__)}
            for level, groups in by_class.items()
        },
        {name: Accuracy.of(group) for name, group in sorted(unknown.items())},
        {
            NO_GAP if gap is None else str(gap): Accuracy.of(gaps[gap])
            for gap in sorted(gaps, key=lambda gap: (gap is None, gap))
        },
        _lengths(pairs),
        _rewards(pairs),
    )


def _group(pairs: Iterable[JudgedPair], key) -> dict[Any, list[JudgedPair]]:
    groups: dict[Any, list[JudgedPair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    return groups


def _lengths(pairs: Sequence[JudgedPair]) -> dict[str, float]:
    lengths = np.array([(pair.chosen_length, pair.rejected_length) for pair in pairs], np.float64)
    rewards = np.array([(pair.chosen, pair.rejected) for pair in pairs], np.float64)
    longer, better = lengths[:, 0] - lengths[:, 1], rewards[:, 0] - rewards[:, 1]
    differ = longer != 0
    agree = np.where(better == 0, 0.5, (better > 0) == (longer > 0))[differ]
    found = {"chosen": float(lengths[:, 0].mean()), "rejected": float(lengths[:, 1].mean())}
    if differ.any():
        found["agreement"] = float(agree.mean())
    if longer.std() > 0 and better.std() > 0:
        found["correlation"] = float(np.corrcoef(longer, better)[0, 1])
    return found


def _rewards(pairs: Sequence[JudgedPair]) -> dict[str, float]:
    chosen = np.array([pair.chosen for pair in pairs], np.float64)
    rejected = np.array([pair.rejected for pair in pairs], np.float64)
    groups = {"chosen": chosen, "rejected": rejected, "all": np.concatenate([chosen, rejected])}
    return {f"{name}_{what}": float(getattr(x, what)()) for name, x in groups.items() for what in ("mean", "std")}


def print_report(report: Report, taxonomy: Taxonomy, console: Console, level: int = 2) -> None:
    """Prints tables: overall and by gap; by class, down to a `level`."""
    table = _table("pairs by the gap of their scores")
    table.add_column("the paper's", justify="right")
    table.add_row("all", *_cells(report.overall), "")
    for gap, accuracy in report.by_gap.items():
        paper = PAPER_ACCURACY.get(int(gap)) if gap != NO_GAP else None
        table.add_row(gap, *_cells(accuracy), "" if paper is None else f"{paper:.1%}")
    console.print(table)
    classes = [c for c in taxonomy.classes if c.level <= level and c.id in report.by_class[c.level]]
    if classes or set(report.unknown) - {NO_CLASS}:
        table = _table("pairs by the class of their prompt")
        for c in classes:
            table.add_row("  " * (c.level - 1) + f"{c.en} {c.zh}", *_cells(report.by_class[c.level][c.id]))
        for name, accuracy in report.unknown.items():
            table.add_row(name if name == NO_CLASS else f"not in the taxonomy: {name}", *_cells(accuracy))
        console.print(table)
    lengths, rewards = report.lengths, report.rewards
    text = f"Answers have {lengths['chosen']:.1f} tokens if chosen and {lengths['rejected']:.1f} if rejected"
    if "agreement" in lengths:
        text += f"; the reward model prefers the longer one in {lengths['agreement']:.1%} of pairs of different lengths"
    if "correlation" in lengths:
        text += f" (correlation of reward and length {lengths['correlation']:.2f})"
    console.print(f"{text}.")
    console.print(
        f"Rewards: {rewards['chosen_mean']:.4f} if chosen, {rewards['rejected_mean']:.4f} if rejected; of all, "
        f"{rewards['all_mean']:.4f} on average with a standard deviation of {rewards['all_std']:.4f}."
    )


def _table(title: str):
    headers = (title, "pairs", "ties", "accuracy", "95 % interval", "longer one wins")
    return make_table(*headers, numbers_from=1)


def _cells(accuracy: Accuracy) -> tuple[str, ...]:
    interval = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
    return f"{accuracy.pairs:,}", f"{accuracy.ties:,}", f"{accuracy.value:.1%}", interval, f"{accuracy.longer_wins:.1%}"


def plot_report(report: Report, taxonomy: Taxonomy, path: Path) -> None:
    """Plots accuracy with intervals by gap, beside the paper's, and by class of the first two levels."""
    classes = [c for c in taxonomy.classes if c.level <= 2 and c.id in report.by_class[c.level]]
    # In English: not every font has Chinese characters.
    by_class = {c.en: report.by_class[c.level][c.id] for c in classes} | {
        name: accuracy for name, accuracy in report.unknown.items() if name.isascii()
    }
    height = max(4.5, 1.5 + 0.26 * len(by_class))
    with picture(path, 1, 2, figsize=(12, height), width_ratios=(1, 1.4)) as (left, right):
        gaps = {"all": report.overall, **report.by_gap}
        _bars(left, list(gaps), list(gaps.values()), horizontal=False)
        paper = [
            (i, 100 * PAPER_ACCURACY[int(gap)])
            for i, gap in enumerate(gaps)
            if gap.isdigit() and int(gap) in PAPER_ACCURACY
        ]
        if paper:
            left.plot(*zip(*paper, strict=True), "D", color="black", label="the paper's reward model")
            left.legend()
        left.axhline(50, color="gray", linestyle="--", linewidth=1)
        left.set(xlabel="gap of the scores", ylabel="chosen answer wins (%)", ylim=(0, 103))
        _bars(right, list(by_class), list(by_class.values()), horizontal=True)
        for bar, c in zip(right.patches, classes, strict=False):
            bar.set_alpha(0.9 if c.level == 1 else 0.5)
        right.axvline(50, color="gray", linestyle="--", linewidth=1)
        right.invert_yaxis()
        right.set(xlabel="chosen answer wins (%)", xlim=(0, 103), title="by class of the prompt")


def _bars(axes: Any, names: list[str], groups: list[Accuracy], horizontal: bool) -> None:
    values = [100 * a.value for a in groups]
    errors = [[100 * (a.value - a.low) for a in groups], [100 * (a.high - a.value) for a in groups]]
    places = range(len(names))
    if horizontal:
        axes.barh(places, values, xerr=errors, color="tab:blue", alpha=0.7, capsize=2)
        axes.set_yticks(places, names)
    else:
        axes.bar(places, values, yerr=errors, color="tab:blue", alpha=0.7, capsize=3)
        axes.set_xticks(places, names)
