"""What `bc2 paper` shows of each part, read from the files of its programs, beside the report's own figures.

Sections, tables and figures are those of "Baichuan 2: Open Large-scale Language Models" (arXiv 2309.10305). Whether a
result agrees with the report is decided here from the numbers, so that the sentence cannot contradict its table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bc2_jax.demo.reading import evaluations, read_json
from bc2_jax.demo.stage import Picture, Result, Table
from bc2_jax.train.metrics import read_metrics

_PAPER_COMPRESSION = (
    ("LLaMA 2", 32_000, 1.037), ("Bloom", 250_680, 0.501), ("ChatGLM 2", 64_794, 0.527), ("Baichuan 1", 64_000, 0.570),
    ("Baichuan 2", 125_696, 0.498),
)  # fmt: skip
_PAPER_MFU = 0.577
_DIVERGED = 0.5
"""Nats above the best run at which a run counts as failed."""


def read_waterfall(workdir: Path) -> Result:
    report = read_json(workdir / "curated" / "report.json")
    total = report["read"]["bytes"]
    rows = [
        (
            step["label"],
            f"{step['bytes'] / total:.2%}",
            "-" if step["paper_percent"] is None else f"{step['paper_percent']} %",
        )
        for step in report["waterfall"]
    ]
    kept = report["written"]["bytes"] / total
    rows.append(("kept", f"{kept:.2%}", "31.68 %"))
    return Result(
        (
            f"We keep {kept:.0%}, the report 31.68 %: a novel, a manual and a library have few copies of each other, "
            "where crawls of the web are full of them. The shares can't agree on such text.",
        ),
        (Table("Share of the raw bytes that each step removes", ("step", "ours", "the report"), tuple(rows)),),
        (Picture("curated/waterfall.png", "What each step leaves, as the report's figure"),),
        figures={"kept": kept},
    )


def read_compression(workdir: Path) -> Result:
    files = {path.stem: path for path in sorted((workdir / "tokenizers").glob("*.report.json"))}
    reports = [read_json(path) for path in [*files.values(), workdir / "tokenizer.report.json"]]
    measured = sorted((report["vocab_size"], tokens_per_character(report)) for report in reports)
    rows = tuple((f"ours, {size:,} pieces", f"{rate:.3f}") for size, rate in measured)
    rows += tuple((f"{name}, {size:,} pieces (the report)", f"{rate:.3f}") for name, size, rate in _PAPER_COMPRESSION)
    falls = all(a[1] > b[1] for a, b in zip(measured, measured[1:], strict=False))
    verdict = "falls with every larger vocabulary" if falls else "does not fall with every larger vocabulary"
    return Result(
        (
            f"The number of tokens a character {verdict}. The values can't be compared: the report's text is mostly "
            "modern Chinese and English, ours half a classical novel and half code.",
        ),
        (Table("Tokens a character of held-out text; less is better", ("tokenizer", "tokens a character"), rows),),
        figures={str(size): rate for size, rate in measured},
    )


def tokens_per_character(report: dict[str, Any]) -> float:
    """Of held-out text in all languages, of the tokenizer that was trained."""
    found = report["compression"]["results"]
    return sum(one["tokens"] for one in found) / sum(one["characters"] for one in found)


def read_positions(workdir: Path) -> Result:
    losses = {folder.name: final_loss(folder) for folder in sorted((workdir / "positions").iterdir())}
    by_kind = {kind: [loss for name, loss in losses.items() if name.startswith(kind)] for kind in ("rope", "alibi")}
    difference = abs(mean(by_kind["rope"]) - mean(by_kind["alibi"]))
    spread = max(max(values) - min(values) for values in by_kind.values())
    agrees = difference <= spread
    seeds = f"{len(by_kind['rope'])} seeds"
    verdict = (
        f"no larger than what {seeds} of one kind differ ({spread:.3f}): as in the report, no difference shows"
        if agrees
        else f"larger than what {seeds} of one kind differ ({spread:.3f}); the report finds no difference, at 7B and "
        "13B and far more tokens"
    )
    rows = tuple((name, f"{loss:.3f}") for name, loss in losses.items())
    return Result(
        (f"The mean losses differ by {difference:.3f} nats a token, {verdict}.",),
        (Table("Loss on held-out text", ("run", "nats a token"), rows),),
        (Picture("positions.png", "Training loss with RoPE and ALiBi"),), figures={**losses, "agrees": agrees},
    )  # fmt: skip


def read_norm_head(workdir: Path) -> Result:
    runs = {tuple(folder.name.split("_", 1)): folder for folder in (workdir / "norm_head").iterdir()}
    rates = sorted({rate for _, rate in runs}, key=float)
    losses = {key: final_loss(folder) for key, folder in runs.items()}
    norms = {key: head_norms(folder) for key, folder in runs.items()}
    rows = tuple(
        (
            rate,
            *(f"{losses[kind, rate]:.3f}" for kind in ("with", "without")),
            *(f"{norms[kind, rate]:.1f}" for kind in ("with", "without")),
        )
        for rate in rates
    )
    best = min(losses.values())
    works = {kind: [r for r in rates if losses[kind, r] < best + _DIVERGED] for kind in ("with", "without")}
    more = len(works["with"]) - len(works["without"])
    if more > 0:
        verdict = "With NormHead training works at higher rates than without, as the report finds."
    elif more == 0:
        verdict = (
            "Both work at the same rates: at this size and length the report's instability without NormHead does not "
            "show."
        )
    else:
        verdict = "Without NormHead training works at higher rates than with it: the opposite of the report's finding."
    highest = " and ".join(f"{kind} it up to {rates_[-1] if rates_ else 'none'}" for kind, rates_ in works.items())
    return Result(
        (
            f"{verdict} Within {_DIVERGED} nats of the best loss are runs {highest}.",
        ),
        (
            Table(
                "Loss on held-out text, and the largest over the mean norm of a row of the head",
                ("peak learning rate", "loss with", "loss without", "norms with", "norms without"), rows,
            ),
        ),
        (Picture("norm_head.png", "Training loss with and without NormHead"),),
        figures={f"{kind} {rate}": loss for (kind, rate), loss in losses.items()},
    )  # fmt: skip


def head_norms(folder: Path) -> float:
    """The largest norm of a row of the head over the mean norm, after the last step that has it."""
    last = [m for m in read_metrics(folder / "metrics.jsonl") if "head_row_norm_max" in m][-1]
    return float(last["head_row_norm_max"] / last["head_row_norm_mean"])


def read_max_z(workdir: Path) -> Result:
    found = read_json(workdir / "max_z.json")
    penalties = list(next(iter(found.values()))["penalties"])
    headers = ("weight of max-z", "largest logit", "loss", *(f"KL at penalty {p}" for p in penalties),
               *(f"changed at {p}" for p in penalties))  # fmt: skip
    rows = tuple(
        (
            weight, f"{one['largest_logit']:.2f}", f"{one['loss']:.3f}",
            *(f"{one['penalties'][p]['kl']:.4f}" for p in penalties),
            *(f"{one['penalties'][p]['changed']:.1%}" for p in penalties),
        )
        for weight, one in found.items()
    )  # fmt: skip
    sizes = [one["largest_logit"] for one in found.values()]
    changes = [one["penalties"][penalties[0]]["kl"] for one in found.values()]
    shrinks = all(a > b for a, b in zip(sizes, sizes[1:], strict=False))
    follows = (sizes[-1] < sizes[0]) == (changes[-1] < changes[0])
    first = "The larger the weight, the smaller the logits, as in the report." if shrinks else (
        "The logits do not shrink with every larger weight here."
    )  # fmt: skip
    second = (
        f"A penalty of {penalties[0]} changes predictions "
        + ("less where logits are smaller, which is the report's reason for max-z." if follows else
           "no less where logits are smaller: the report's reason for max-z does not show.")
    )  # fmt: skip
    return Result(
        (
            f"{first} {second} A run of minutes has logits of about {sizes[0]:.0f}, the report speaks of hundreds: at "
            "its own weight of 2e-4 little can show here.",
        ),
        (Table("Logits on held-out text, and what a repetition penalty does to them", headers, rows),),
        (Picture("max_z.png", "The largest logit of a token during training, the mean of a batch"),), figures=found,
    )  # fmt: skip


def read_ladder(workdir: Path) -> Result:
    record = read_json(workdir / "scaling" / "scaling.json")
    held = record["largest_left_out"]
    rows = tuple((run["name"], f"{run['C']:.3g}", f"{run['loss']:.4f}") for run in record["runs"])
    guess = record["runs"][-2]["loss"] / held["actual"] - 1
    better = abs(held["error"]) < abs(guess)
    return Result(
        (
            f"From {len(rows) - 1} smaller models the law predicts {held['predicted']:.4f} nats a token for the "
            f"largest, which reaches {held['actual']:.4f}: {held['error']:+.2%} off, "
            f"{'better' if better else 'not better'} than taking the loss of the next smaller one ({guess:+.2%}). The "
            "report predicts its 7B and 13B from models of 10 M to 3 B and calls that accurate, without figures.",
        ),
        (Table("Losses on held-out text", ("model", "training FLOPs", "nats a token"), rows),),
        (Picture("scaling/scaling.png", "The law through the losses of the models"),),
        figures={"predicted": held["predicted"], "actual": held["actual"], "error": held["error"]},
    )


def read_curves(workdir: Path) -> Result:
    points = read_json(workdir / "curves" / "curve.json")
    names = [name for name in points[-1] if name not in ("step", "tokens")]
    rows = tuple(
        (f"{point['step']}", f"{point['tokens']:,}",
         *(f"{point[name]['value']:.1f} ± {point[name]['stderr']:.1f}" for name in names))
        for point in points
    )  # fmt: skip
    rises = [name for name in names
             if points[-1][name]["value"] - points[0][name]["value"]
             > 2 * math.hypot(points[-1][name]["stderr"], points[0][name]["stderr"])]  # fmt: skip
    verdict = f"{' and '.join(rises)} rises by more than two standard errors" if rises else (
        "no benchmark rises by more than two standard errors: all stay near the 25 % of guessing"
    )  # fmt: skip
    return Result(
        (
            f"Over {points[-1]['tokens']:,} tokens {verdict}. The report's curves rise from 220 B to 2,640 B "
            "tokens; what can be shown here is that every checkpoint is evaluated in the same way.",
        ),
        (Table("Right answers in per cent, ± one standard error", ("step", "tokens", *names), rows),),
        (Picture("curves/curve.png", "Benchmarks over checkpoints"),), figures={"points": points},
    )  # fmt: skip


def read_reward_gaps(workdir: Path) -> Result:
    report = read_json(workdir / "reward_report.json")
    paper = report["paper_by_gap"]
    rows = tuple(
        (gap, f"{one['pairs']}", f"{one['value']:.1%}", f"{one['low']:.0%} to {one['high']:.0%}",
         f"{paper[gap]:.1%}" if gap in paper else "-")
        for gap, one in report["by_gap"].items()
    )  # fmt: skip
    values = [one["value"] for _, one in sorted(report["by_gap"].items())]
    rises = all(a <= b for a, b in zip(values, values[1:], strict=False))
    verdict = "rises with the gap, as in the report" if rises else "does not rise with every gap, unlike the report's"
    return Result(
        (
            f"Accuracy {verdict}. The report's gaps are differences of people's scores. Ours number the kinds of "
            "mistake (1 repeats itself, 3 is in the wrong language, 5 is wrong), and a small model notices the form of "
            "an answer before its truth.",
        ),
        (Table("Accuracy by gap between both answers", ("gap", "pairs", "ours", "95 %", "the report"), rows),),
        (Picture("reward_report.png", "Accuracy by gap and by class"),), figures=report["by_gap"],
    )  # fmt: skip


def read_alignment(workdir: Path) -> Result:
    changes = read_json(workdir / "red_team" / "report.json")["changes"]
    asked = read_metrics(workdir / "rl" / "metrics.jsonl")
    first, last = evaluations(asked, "validation_answers_right")
    rows = [("held-out questions answered rightly", f"{first['validation_answers_right']:.1%}",
             f"{last['validation_answers_right']:.1%}", "-")]  # fmt: skip
    rows += [
        (f"{one['measure']}, {one['name']}", f"{one['before']:.1%}", f"{one['after']:.1%}", f"{one['p_value']:.2g}")
        for one in changes
        if one["name"] == "all"
    ]
    sure = [one["measure"] for one in changes if one["name"] == "all" and one["p_value"] < 0.05]
    verdict = f"{' and '.join(sure)} changes beyond chance (sign test, p < 0.05)" if sure else (
        "no measure of safety changes beyond chance"
    )  # fmt: skip
    return Result(
        (
            f"After a few iterations of PPO {verdict}. The report's figure shows that both helpfulness and "
            "harmlessness rise; a model that can't yet understand an attack can neither fall for it nor refuse it.",
        ),
        (Table("Before and after PPO", ("measure", "before", "after", "p"), tuple(rows)),),
        tuple(Picture(f"red_team/{name}", "Before and after, by class")
              for name in ("before_after.png",) if (workdir / "red_team" / name).is_file()),
        figures={"changes": changes},
    )  # fmt: skip


def read_mfu(workdir: Path) -> Result:
    rows, figures = [], {}
    for size in ("7b", "13b"):
        report = read_json(workdir / f"mfu_{size}.json")
        best, worst = report["estimated_mfu"], report["estimated_mfu_low"]
        figures[size] = {"mfu": best, "at_worst": worst}
        rows.append((f"{size.upper()}, 1,024 chips of v5p, estimate", f"{best:.1%}", f"{worst:.1%}"))
    rows.append(("the report, 1,024 A800, measured", f"{_PAPER_MFU:.1%}", ""))
    return Result(
        (
            "Nothing was run: these are compile-time estimates, and an upper end (docs/tpu.md says how they compare "
            "with published runs). The report measured 180 TFLOP/s a GPU; the chips differ in network and memory.",
        ),
        (Table("Model FLOPs utilisation", ("", "MFU", "at worst"), tuple(rows)),), figures=figures,
    )  # fmt: skip


def final_loss(folder: Path) -> float:
    """The last cross entropy on held-out text of a run, in nats a token; inf if it is not finite."""
    _, last = evaluations(read_metrics(folder / "metrics.jsonl"), "validation_cross_entropy")
    loss = float(last["validation_cross_entropy"])
    return loss if math.isfinite(loss) else math.inf


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
