"""What the report shows of each stage of `bc2 demo --all`, read from the files that its programs wrote."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.demo_preferences import GAPS
from bc2_jax.demo.records import log_path
from bc2_jax.demo.stage import Picture, Result, Table
from bc2_jax.train.metrics import read_metrics

QUESTIONS = 100
"""Held-out questions that each run is asked."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_texts(workdir: Path) -> Result:
    files = sorted(path for path in (workdir / "raw").rglob("*") if path.is_file())
    rows = []
    for path in files:
        content = path.read_bytes()
        lines = content.count(b"\n")
        rows.append((str(path.relative_to(workdir)), f"{lines:,}", f"{len(content) / 1e3:,.0f} kB"))
    return Result(tables=(Table("Files", ("file", "lines", "size"), tuple(rows)),))


def read_curation(workdir: Path) -> Result:
    report = read_json(workdir / "curated" / "report.json")
    total = report["read"]["bytes"]
    counts = [("read", report["read"])]
    counts += [(f"- {step['label']}", step) for step in report["waterfall"]]
    counts.append(("written", report["written"]))
    rows = tuple(
        (label, f"{count['documents']:,}", f"{count['bytes'] / 1e6:.2f}", f"{count['bytes'] / total:.2%}")
        for label, count in counts
    )
    kept = report["written"]["bytes"] / total
    return Result(
        sentences=(
            f"{kept:.1%} of the text is kept: it is a book, a manual and a library, not the open web, of which the "
            "paper keeps a third.",
        ),
        tables=(Table("What each step removes", ("step", "documents", "MB", "share of the text"), rows),),
        pictures=(Picture("curated/waterfall.png", "Text that each step of the curation leaves"),),
        figures={"kept_share": kept, "documents": report["written"]["documents"]},
    )


def read_tokenizer(workdir: Path) -> Result:
    report, corpus = read_json(workdir / "tokenizer.report.json"), read_json(workdir / "rows" / "corpus.json")
    passed = sum(check["passed"] for check in report["checks"])
    parts: dict[str, list[int]] = {}
    for part in corpus["parts"]:
        counts = parts.setdefault(part["source"], [0, 0, 0])
        for place, name in enumerate(("documents", "tokens", "rows")):
            counts[place] += part[name]
    rows = tuple((source, *(f"{count:,}" for count in counts)) for source, counts in parts.items())
    tokens = sum(counts[1] for counts in parts.values())
    return Result(
        sentences=(
            f"{report['vocab_size']:,} pieces; {passed} of {len(report['checks'])} checks pass. "
            f"{tokens:,} tokens for training.",
        ),
        tables=(Table("Rows for training", ("source", "documents", "tokens", "rows"), rows),),
        figures={"tokens": tokens, "checks_passed": passed, "checks": len(report["checks"])},
    )


def read_base(workdir: Path) -> Result:
    metrics = read_metrics(workdir / "base" / "metrics.jsonl")
    first, last = evaluations(metrics, "validation_cross_entropy")
    speed = median([m["tokens_per_second"] for m in metrics if m.get("tokens_per_second")])
    config = read_json(workdir / "base" / "config.json")
    vocabulary = config["model"]["vocab_size"]
    rows = (
        ("knows nothing, ln V", f"{math.log(vocabulary):.3f}"),
        (f"the model at step {first['step']}", f"{first['validation_cross_entropy']:.3f}"),
        (f"the model at step {last['step']}", f"{last['validation_cross_entropy']:.3f}"),
    )
    log = log_path(workdir, "base").read_text(encoding="utf-8", errors="replace")
    trained = [m["trained_tokens"] for m in metrics if m.get("trained_tokens")][-1]
    return Result(
        sentences=(f"{trained:,.0f} tokens, at {speed:,.0f} tokens/s.",),
        tables=(Table("Held-out text", ("model", "nats a token"), rows),),
        pictures=(
            Picture(
                "base/loss.png", "Loss of pre-training, on held-out text of 80 rows; n-gram models on all held-out rows"
            ),
        ),
        texts={f"Sample after {prompt!r}": f"{prompt}{text}" for prompt, text in read_samples(log).items()},
        figures={"loss": last["validation_cross_entropy"], "tokens_per_second": speed, "tokens": trained},
    )


def read_samples(log: str) -> dict[str, str]:
    """Prompt -> its continuation, of the last samples that a run has printed to its log."""
    found: dict[str, str] = {}
    prompt = None
    for line in log.split("\n"):
        if match := re.fullmatch(r"--- (['\"].*['\"]) continues:", line):
            found = {} if prompt is None else found
            prompt = ast.literal_eval(match[1])
            found[prompt] = ""
        elif line == "---":
            prompt = None
        elif prompt is not None:
            found[prompt] += f"{line}\n"
    return {prompt: text.removesuffix("\n") for prompt, text in found.items()}


def read_scaling(workdir: Path) -> Result:
    record = read_json(workdir / "scaling" / "scaling.json")
    rows = tuple((run["name"], f"{run['C']:.3g}", f"{run['loss']:.4f}") for run in record["runs"])
    held = record["largest_left_out"]
    sentences = []
    figures: dict[str, Any] = {"runs": {run["name"]: run["loss"] for run in record["runs"]}}
    if held is not None:
        guess = record["runs"][-2]["loss"] / held["actual"] - 1
        sentences.append(
            f"From the smaller models the law predicts {held['predicted']:.4f} nats a token for the pre-trained one, "
            f"which has {held['actual']:.4f}: {held['error']:+.2%} off. The loss of the model before it, taken as the "
            f"prediction, would be {guess:+.2%} off. So few small models show how it is done, not how well."
        )
        figures |= {"predicted": held["predicted"], "actual": held["actual"], "error": held["error"]}
    return Result(
        sentences=tuple(sentences),
        tables=(Table("Losses on held-out text", ("model", "training FLOPs", "nats a token"), rows),),
        pictures=(Picture("scaling/scaling.png", "The law through the losses of the models"),),
        figures=figures,
    )


def read_chat(workdir: Path) -> Result:
    result = read_questions(workdir, "chat", "Fine-tuning")
    metrics = read_metrics(workdir / "chat" / "metrics.jsonl")
    first, last = evaluations(metrics, "validation_cross_entropy")
    losses = (f"{m['validation_cross_entropy']:.3f}" for m in (first, last))
    row = ("loss on held-out answers, nats a token", *losses)
    (table,) = result.tables
    picture = Picture("chat/answers.png", "Held-out answers during fine-tuning")
    return Result(
        result.sentences, (Table(table.title, table.headers, (row, *table.rows)),), (picture,), result.texts,
        result.figures,
    )  # fmt: skip


def read_reward(workdir: Path) -> Result:
    report = read_json(workdir / "reward_report.json")
    # An answer that repeats itself, is in another language or is wrong has a gap of its own (demo_preferences).
    names = {str(gap): f"the other answer: {name} (gap {gap})" for name, gap in GAPS.items()}
    groups = [("all held-out pairs", report["overall"])]
    groups += [(names.get(gap, gap), accuracy) for gap, accuracy in report["by_gap"].items()]
    rows = tuple(
        (name, f"{one['pairs']}", f"{one['value']:.0%}", f"{one['low']:.0%} to {one['high']:.0%}")
        for name, one in groups
    )
    accuracy = report["overall"]
    above = "better than a guess" if accuracy["low"] > 0.5 else "which cannot be told from a guess"
    return Result(
        (f"The better answer has the higher reward in {accuracy['value']:.0%} of the pairs, {above}.",),
        (Table("How often the better answer has the higher reward", ("pairs", "number", "share", "95 %"), rows),),
        (Picture("reward_report.png", "Accuracy by the gap between the two answers, beside the paper's"),),
        figures={"accuracy": accuracy["value"], "pairs": accuracy["pairs"]},
    )


def read_dpo(workdir: Path) -> Result:
    result = read_questions(workdir, "dpo", "DPO")
    first, last = evaluations(read_metrics(workdir / "dpo" / "metrics.jsonl"), "validation_accuracy")
    row = ("held-out pairs told apart", *(f"{m['validation_accuracy']:.0%}" for m in (first, last)))
    (table,) = result.tables
    return Result(result.sentences, (Table(table.title, table.headers, (row, *table.rows)),), figures=result.figures)


def read_rl(workdir: Path) -> Result:
    result = read_questions(workdir, "rl", "PPO")
    metrics = [m for m in read_metrics(workdir / "rl" / "metrics.jsonl") if "step_seconds" in m]
    few = max(1, len(metrics) // 4)
    (table,) = result.tables
    rows = tuple(
        (label, *(f"{sum(m[name] for m in part) / len(part):.3f}" for part in (metrics[:few], metrics[-few:])))
        for name, label in (
            ("reward", "mean reward, first and last quarter of the iterations"),
            ("kl", "KL to the chat model, nats a token, likewise"),
        )
        if name in metrics[0]
    )
    return Result(
        result.sentences, (Table(table.title, table.headers, (*rows, *table.rows)),),
        (Picture("rl/rl.png", "Rewards, KL and lengths during PPO"),), result.texts, result.figures,
    )  # fmt: skip


def read_questions(workdir: Path, run: str, name: str) -> Result:
    """How held-out questions are answered before and after a run, and how sure the difference is."""
    metrics = read_metrics(workdir / run / "metrics.jsonl")
    before, after = evaluations(metrics, "validation_answers_right")
    config = read_json(workdir / run / "config.json")
    asked = config["questions"]["limit"]
    labels = {"validation_answers_ended": "answers that end by themselves", "validation_answers_right": "right answers"}
    rows = tuple((label, f"{before[key]:.0%}", f"{after[key]:.0%}") for key, label in labels.items())
    first, last = before["validation_answers_right"], after["validation_answers_right"]
    return Result(
        (f"{name}: {describe_change(first, last, asked)}",),
        (Table(f"{asked} held-out questions", ("", f"step {before['step']}", f"step {after['step']}"), rows),),
        figures={"right_before": first, "right_after": last, "questions": asked},
    )


def describe_change(before: float, after: float, count: int) -> str:
    """A sentence on two shares of right answers to the same questions, by the standard error of their difference.

    The error is that of independent samples: of answers to the same questions it is an upper bound, near enough.
    """
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / count)
    text = f"{before:.0%} of the questions were answered rightly before and {after:.0%} after"
    if abs(after - before) > 2 * error:
        return f"{text}, a difference of more than two standard errors ({error:.1%})."
    return f"{text}, which is within two standard errors ({error:.1%}): no difference can be claimed."


_BENCHMARK_HEADERS = ("model", "benchmark", "items", "right", "standard error", "letters answered")


def read_evaluation(workdir: Path) -> Result:
    folders = [folder for name in ("base", "chat", "rl") if (folder := workdir / "evals" / name).is_dir()]
    rows, figures, far = [], {}, []
    for folder in folders:
        for path in sorted(folder.glob("*/results.json")):
            results = read_json(path)
            metric = results["metrics"][results["headline"]]
            letters = results["answers"].get("as_shown", {})
            answered = " ".join(f"{letter} {count}" for letter, count in letters.items())
            value, error = f"{metric['value']:.1f} %", f"{metric['stderr']:.1f}"
            rows.append((folder.name, results["title"], str(metric["items"]), value, error, answered))
            figures[f"{folder.name} {results['task']}"] = metric
            if abs(metric["value"] - 25) > 2 * metric["stderr"]:
                far.append(f"{folder.name} in {results['title']} ({metric['value']:.1f} %)")
    chance = "A guess is right in 25 %, and "
    if far:
        chance += f"these figures are more than two standard errors from that: {'; '.join(far)}."
    else:
        chance += "every figure is within two standard errors of that: no model understands multiple choice."
    compared = read_json(workdir / "evals" / "base_rl" / "compare.json")["tasks"]
    differences = tuple(
        (one["task"], f"{one['difference']:+.1f}", f"{one['low']:+.1f} to {one['high']:+.1f}", f"{one['p']:.2f}")
        for one in compared
    )
    return Result(
        (chance,),
        (
            Table("Benchmarks", _BENCHMARK_HEADERS, tuple(rows)),
            Table("rl against base", ("benchmark", "points", "95 % interval", "p of a sign test"), differences),
        ),
        figures=figures,
    )  # fmt: skip


def read_export(workdir: Path) -> Result:
    paths = sorted((workdir / "hf").iterdir()) + [workdir / "model.gguf"]
    rows = tuple((str(path.relative_to(workdir)), f"{path.stat().st_size / 1e6:.2f} MB") for path in paths)
    return Result(tables=(Table("Files", ("file", "size"), rows),))


def read_answers(workdir: Path) -> Result:
    record = read_json(workdir / "answers.json")
    rows = tuple(
        (" ".join(a["question"].split()), a["expected"], a["answer"], f"{a['seconds']:.2f} s")
        for a in record["answers"]
    )
    same = "the same" if record["stream_is_the_same"] else "ANOTHER ONE"
    return Result(
        (
            f"The server was ready after {record['seconds_until_ready']:.0f} s, compiling included. The answer as a "
            f"stream is {same}.",
        ),
        (Table("Questions to the server", ("question", "expected", "answer", "time"), rows),),
        figures={"seconds_until_ready": record["seconds_until_ready"]},
    )  # fmt: skip


def evaluations(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first and the last record that have the metric `name`. Raises ValueError if none has."""
    found = [m for m in metrics if m.get(name) is not None]
    if not found:
        raise ValueError(f"no evaluation has {name}.")
    return found[0], found[-1]


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
