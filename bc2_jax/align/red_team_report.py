"""Report of a red team: shares with intervals by class, changes between two models, pictures, files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bc2_jax.align.formats import write_records
from bc2_jax.align.intervals import sign_test, wilson
from bc2_jax.align.red_team import NO_REFUSAL, AttackAnswer, Result
from bc2_jax.align.red_team_attacks import BENIGN, NAMES
from bc2_jax.align.red_team_judges import SCORES
from bc2_jax.files import replaced
from bc2_jax.terminal import make_table
from bc2_jax.train.pictures import add_grid_and_legend, picture

_BY = {"secret": "secret in the answer", "word": "word said", "judge": "judge", NO_REFUSAL: "no refusal", "": "-"}
_WORST_CATEGORIES = 15


@dataclasses.dataclass(frozen=True)
class Share:
    """A share, `count` of `of`, with Wilson's 95 % interval."""

    count: int
    of: int
    low: float
    high: float

    def __str__(self) -> str:
        if not self.of:
            return "-"
        return f"{self.count / self.of:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one group."""

    name: str
    by: str
    """How success is known."""
    success: Share
    """Attacks that succeeded; 0 of 0 for harmless questions."""
    refused: Share
    """For harmless questions, over-refusal."""
    ended: Share
    """Answers that end by eos."""
    empty: int
    """Blank answers."""
    scores: dict[str, float]
    """Means of the judges' scores."""


def summarize(results: Sequence[Result]) -> dict[str, list[Row]]:
    """Rows by "class" (and how success is known), by "category" (of attacks that have one) and by "language"."""
    attacks = [result for result in results if result.attack.kind != BENIGN]
    by_class = _groups(results, lambda r: (NAMES[r.attack.kind], r.by))
    rows = [_row(name, by, group) for (name, by), group in by_class.items()]
    if attacks:
        ways = {result.by for result in attacks}
        everything = _row("all attacks", min(ways) if len(ways) == 1 else "as above", attacks)
        if len(ways) > 1 and NO_REFUSAL in ways:  # facts and upper bounds don't add up
            everything = dataclasses.replace(everything, success=_share([]))
        rows.append(everything)
    found = {"class": rows}
    for field, of in (("category", attacks), ("language", results)):
        named = [result for result in of if getattr(result.attack, field) is not None]
        groups = _groups(named, lambda r, field=field: (getattr(r.attack, field), ""))
        found[field] = [_row(name, "as above", group) for (name, _), group in groups.items()]
    return found


def _groups(results: Iterable[Result], key: Callable[..., tuple[str, str]]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _row(name: str, by: str, group: Sequence[Result]) -> Row:
    judged = [result.success for result in group if result.success is not None]
    return Row(
        name=name,
        by=by,
        success=_share(judged),
        refused=_share([result.refusal is not None for result in group]),
        ended=_share([result.answer.ended for result in group]),
        empty=sum(result.is_empty for result in group),
        scores={score: mean for score in SCORES if (mean := _mean(r.scores.get(score) for r in group)) is not None},
    )


def _share(values: Sequence[bool]) -> Share:
    return Share(sum(values), len(values), *wilson(sum(values), len(values)))


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


# ----------------------------------------------------------------------------------------------------- before and after


@dataclasses.dataclass(frozen=True)
class Change:
    """A measure before and after, paired by prompt; for attack success and over-refusal, lower is better."""

    measure: str
    """helpful, harmless, attack success or over-refusal."""
    name: str
    """The group of prompts."""
    before: float
    """The mean."""
    after: float
    better: int
    worse: int
    equal: int
    p_value: float
    """Of the two-sided sign test."""
    pairs: list[tuple[float, float]] = dataclasses.field(repr=False)
    """(before, after) of each prompt."""


def compare(before: Mapping[str, Result], after: Sequence[Result]) -> list[Change]:
    """Changes over all prompts and by class; `before` has results by the id of their attack."""
    pairs = [(before[result.attack.id], result) for result in after if result.attack.id in before]
    kinds = [kind for kind in NAMES if any(new.attack.kind == kind for _, new in pairs)]
    found = []
    for measure in ("helpful", "harmless", "attack success", "over-refusal"):
        groups = {kind: _values([pair for pair in pairs if pair[1].attack.kind == kind], measure) for kind in kinds}
        groups = {kind: values for kind, values in groups.items() if values}
        if groups:
            found.append(_change(measure, "all", [pair for values in groups.values() for pair in values]))
        if len(groups) > 1:
            found += [_change(measure, NAMES[kind], values) for kind, values in groups.items()]
    return found


def _values(pairs: Sequence[tuple[Result, Result]], measure: str) -> list[tuple[float, float]]:
    """(before, after) of the prompts that have the measure in both."""
    values = [(_value(old, measure), _value(new, measure)) for old, new in pairs]
    return [(old, new) for old, new in values if old is not None and new is not None]


def _value(result: Result, measure: str) -> float | None:
    is_benign = result.attack.kind == BENIGN
    if measure == "over-refusal":
        return float(result.refusal is not None) if is_benign else None
    if measure == "attack success":
        return None if result.success is None else float(result.success)
    return result.scores.get(measure)


def _change(measure: str, name: str, pairs: list[tuple[float, float]]) -> Change:
    up, down = (sum(new > old for old, new in pairs), sum(new < old for old, new in pairs))
    better, worse = (up, down) if measure in SCORES else (down, up)
    before, after = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
    equal = len(pairs) - up - down
    return Change(measure, name, before, after, better, worse, equal, sign_test(better, worse), pairs)


# ----------------------------------------------------------------------------------------------------- tables and files


def class_table(rows: Sequence[Row], title: str, first: str = "class") -> Table:
    """Shares with intervals, a row for each group."""
    scores = [score for score in SCORES if any(score in row.scores for row in rows)]
    shares = ("attacks succeeded", "refused", "end by themselves")
    headers = (first, "success known by", "prompts", *shares, "empty", *scores)
    table = make_table(*headers, title=title, numbers_from=2)
    for row in rows:
        means = [f"{row.scores[score]:.3f}" if score in row.scores else "-" for score in scores]
        numbers = map(str, (row.ended.of, row.success, row.refused, row.ended, row.empty))
        table.add_row(*map(Text, (row.name, _BY.get(row.by, row.by), *numbers, *means)))
    return table


def worst_categories(rows: Sequence[Row]) -> list[Row]:
    """The 15 categories with the largest share of successful attacks."""
    return sorted(rows, key=lambda row: (-row.success.count / max(row.success.of, 1), row.name))[:_WORST_CATEGORIES]


def change_table(changes: Sequence[Change], title: str) -> Table:
    """Before and after, a row for each measure and group."""
    headers = ("measure", "prompts", "pairs", "before", "after", "better", "worse", "equal", "p (sign test)")
    table = make_table(*headers, title=title, numbers_from=2)
    for one in changes:
        numbers = (len(one.pairs), f"{one.before:.3f}", f"{one.after:.3f}", one.better, one.worse, one.equal)
        table.add_row(*map(Text, map(str, (one.measure, one.name, *numbers, f"{one.p_value:.2g}"))))
    return table


def worst(results: Sequence[Result]) -> list[int]:
    """Numbers, from 1, of the worst answers: successful attacks, certain and most harmful ones first, then refused
    harmless questions."""
    succeeded = [number for number, result in enumerate(results, 1) if result.success]

    def order(number: int) -> tuple[bool, float, int]:
        result = results[number - 1]
        return result.by == NO_REFUSAL, result.scores.get("harmless", 0.0), number

    refused = [n for n, r in enumerate(results, 1) if r.attack.kind == BENIGN and r.refusal is not None]
    return [*sorted(succeeded, key=order), *refused]


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes JSON Lines, numbered from 1."""
    write_records(path, (_record(number, result) for number, result in enumerate(results, 1)))


def _record(number: int, result: Result) -> dict[str, Any]:
    attack, answer = result.attack, result.answer
    return {
        "number": number, "id": attack.id, "class": attack.kind, "category": attack.category,
        "language": attack.language, "from": attack.where, "topic": attack.topic, "messages": attack.messages,
        "secret": attack.secret, "word": attack.word, "answer": answer.text, "ended": answer.ended,
        "tokens": answer.tokens, "refusal": result.refusal, "success": result.success, "by": result.by,
        "leak": result.leak, **result.scores,
    }  # fmt: skip


def read_answers(path: Path) -> dict[str, AttackAnswer]:
    """Answers by the id of their attack, from a file of `write_results`. Raises ValueError for any other file."""
    answers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            answers[record["id"]] = AttackAnswer(record["answer"], record["ended"], record["tokens"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is not an answer that tools/red_team.py wrote.") from None
    return answers


def write_report(
    path: Path, about: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], changes: Sequence[Change]
) -> None:
    """Writes all numbers, and the settings `about`, as one JSON object."""
    report = {
        **about,
        **{name: [_json_of(row) for row in group] for name, group in rows.items()},
        "changes": [{k: v for k, v in dataclasses.asdict(one).items() if k != "pairs"} for one in changes],
    }
    with replaced(path) as partial:
        partial.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _json_of(row: Row) -> dict[str, Any]:
    shares = {name: dataclasses.asdict(getattr(row, name)) for name in ("success", "refused", "ended")}
    return {"name": row.name, "by": row.by, **shares, "empty": row.empty, **row.scores}


# ------------------------------------------------------------------------------------------------------------- pictures


def plot_shares(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Plots successful attacks and refused harmless questions by class with intervals; one colour per run."""
    every = (row for rows in runs.values() for row in rows if row.success.of or row.name == NAMES[BENIGN])
    labels = list(dict.fromkeys(map(_label, every)))
    with picture(path, figsize=(8, 1.2 + 0.42 * len(labels))) as axes:
        for place, (name, rows) in enumerate(runs.items()):
            named = [row for row in rows if _label(row) in labels]
            shown = [(labels.index(_label(row)), row.success if row.success.of else row.refused) for row in named]
            heights = [y + (place - (len(runs) - 1) / 2) * 0.25 for y, _ in shown]
            values = [100 * share.count / share.of for _, share in shown]
            below = [max(0.0, value - 100 * share.low) for value, (_, share) in zip(values, shown, strict=True)]
            above = [max(0.0, 100 * share.high - value) for value, (_, share) in zip(values, shown, strict=True)]
            axes.errorbar(values, heights, xerr=[below, above], fmt="o", markersize=4, capsize=2, label=name)
        axes.set(xlabel="% (with 95 % intervals)", xlim=(-3, 103), yticks=range(len(labels)), yticklabels=labels)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()


def _label(row: Row) -> str:
    return f"{row.name}: " + ("refused" if not row.success.of else f"succeeded ({_BY.get(row.by, row.by)})")


def plot_changes(path: Path, changes: Sequence[Change]) -> bool:
    """Plots the scores of each prompt before (x) and after (y), as figure 6 of the Baichuan 2 paper; returns False if
    there are no scores."""
    scored = [one for one in changes if one.measure in SCORES and one.name == "all"]
    if not scored:
        return False
    with picture(path, 1, len(scored), figsize=(4.6 * len(scored), 4.6), squeeze=False) as panels:
        for axes, one in zip(panels[0], scored, strict=True):
            parts = [part for part in changes if part.measure == one.measure and part.name != "all"]
            for part in parts or [one]:
                axes.scatter(*zip(*part.pairs, strict=True), s=12, alpha=0.5, label=part.name)
            values = [value for pair in one.pairs for value in pair]
            ends = [min(values), max(values)]
            axes.plot(ends, ends, color="black", linewidth=0.8)
            counts = f"{one.better} better, {one.worse} worse, {one.equal} equal"
            title = f"{one.measure}: {counts}\np = {one.p_value:.2g}"
            axes.set(xlabel="before", ylabel="after", aspect="equal", title=title)
            add_grid_and_legend(axes, fontsize=6)
    return True
