"""Compares two models on the same items: paired bootstrap and sign test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from bc2_jax.align.intervals import sign_test
from bc2_jax.evaluate.evaluation import read_results
from bc2_jax.evaluate.records import NAME, Record, read_records
from bc2_jax.terminal import make_table
from bc2_jax.validation import require

_RESAMPLES = 10_000


class Difference(NamedTuple):
    """B against A on the items that both answered, in percent."""

    task: str
    way: str  # way of scoring
    items: int
    a: float
    b: float
    difference: float
    low: float  # ends of the 95 % interval: percentiles of a paired bootstrap over items
    high: float
    share: float  # share of resamples in which B is better; ties count half
    better: int  # items that only B has right
    worse: int
    p: float  # two-sided exact sign test of `better` against `worse`


def bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = _RESAMPLES) -> np.ndarray:
    """Means of b - a over items drawn with replacement, fp64 [resamples].

    The counts of each distinct difference are drawn from a multinomial, so items need not be listed.
    """
    values, counts = np.unique(np.asarray(b, np.float64) - np.asarray(a, np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    return np.asarray(drawn @ values / counts.sum())


def compare_scores(task: str, way: str, a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """Compares the scores in 0..1 of two models, item by item."""
    means = bootstrap(a, b, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    better, worse = sum(y > x for x, y in zip(a, b, strict=True)), sum(y < x for x, y in zip(a, b, strict=True))
    first, second = math.fsum(a) / len(a), math.fsum(b) / len(b)
    share = float(np.mean(means > 0) + np.mean(means == 0) / 2)
    return Difference(
        task, way, len(a), 100 * first, 100 * second, 100 * (second - first), 100 * float(low), 100 * float(high),
        share, better, worse, sign_test(better, worse),
    )  # fmt: skip


def compare(a: Path, b: Path, letter: str | None = None, seed: int = 0) -> tuple[list[Difference], dict[str, str]]:
    """(differences of all common benchmarks by their leading way of scoring, or by `letter`; benchmark -> why it is
    left out).

    Raises ValueError if there is no common benchmark, none can be compared, or one was asked with other prompts, shots
    or choices.
    """
    first, second = read_results(a), read_results(b)
    both = [name for name in first if name in second]
    names = ", ".join(first) or "none", ", ".join(second) or "none"
    require(bool(both), "--compare", f"{a} {b}", f"they have no benchmark in common ({names[0]}; {names[1]})")
    found, left_out = [], {}
    for name in both:
        if first[name]["unit"] != "percent":
            left_out[name] = f"its figure ({first[name]['headline']}) is not a mean over items"
            continue
        pairs = _pair(a, b, name)
        ways = list(pairs[0][0]["right"]) if pairs else []
        if not ways:
            left_out[name] = "no item that both have is judged"
            continue
        way = letter if letter is not None and letter in ways else ways[0]
        of_a, of_b = ([float(pair[side]["right"][way]) for pair in pairs] for side in (0, 1))
        found.append(compare_scores(name, way, of_a, of_b, seed))
    problems = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    require(bool(found), "--compare", f"{a} {b}", problems)
    return found, left_out


def _pair(a: Path, b: Path, task: str) -> list[tuple[Record, Record]]:
    """Records of the items that both have judged, in the order of `a`."""
    of_a, of_b = ({r["id"]: r for r in read_records(folder / task / NAME)} for folder in (a, b))
    pairs = [(record, of_b[item]) for item, record in of_a.items() if item in of_b]
    require(bool(pairs), "--compare", f"{a} {b}", f"they have no item of {task} in common")
    for x, y in pairs:
        fields = [name for name in ("prompt", "choices", "bare", "gold", "target") if x.get(name) != y.get(name)]
        if fields:
            raise ValueError(
                f"{task} cannot be compared: {x['id']!r} has another {fields[0]} in {b} than in {a}; evaluate both "
                "with the same files, --shots and --max-length."
            )
    return [(x, y) for x, y in pairs if x["right"] and y["right"]]


def print_differences(
    console: Console, differences: Sequence[Difference], left_out: Mapping[str, str], a: str, b: str
) -> None:  # fmt: skip
    """The table and the benchmarks left out of it."""
    headers = (
        "benchmark", "way", "items", "A", "B", "B - A", "95 % interval", "B better in", "right only in A, B", "p",
    )  # fmt: skip
    table = make_table(*headers, title=f"A = {a}\nB = {b}", numbers_from=2)
    for d in differences:
        table.add_row(
            d.task, d.way, f"{d.items:,}", f"{d.a:.2f}", f"{d.b:.2f}", f"{d.difference:+.2f}",
            f"{d.low:+.2f} to {d.high:+.2f}", f"{d.share:.1%}", f"{d.worse}, {d.better}", f"{d.p:.2g}",
        )  # fmt: skip
    console.print(table)
    for name, why in left_out.items():
        console.print(f"{name} is left out: {why}")
    console.print(
        "A, B: percent of items that are right. Interval and share of resamples in which B is better: paired bootstrap "
        "over items; p: sign test on the items that only one has right. Both treat the items as a sample; neither "
        "covers the variation between training runs."
    )


def as_json(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """For --out."""
    return [difference._asdict() for difference in differences]
