"""OUT/report.json, report.md and waterfall.png: what was kept, what was removed and why, with samples."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from bc2_jax.curate.problems import UnitReport
from bc2_jax.curate.shards import rule_of
from bc2_jax.curate.storage import Folder

# Steps that remove text, in order: label, and percent of all data in the paper (Baichuan 2 report, figure 2).
STEPS = {
    "exact": ("exact copies", 29.89),
    "heuristics": ("heuristics", 1.77),
    "quality": ("low quality", 3.06),
    "safety": ("safety", None),
    "near": ("near copies (MinHash)", 19.13),
    "contamination": ("benchmark overlap", None),
    "dense": ("near copies (dense features)", None),
    "spans": ("copied paragraphs and sentences", 14.47),
}
_SAMPLES = 5
_SAMPLE_CHARACTERS = 160


def add_counts(parts: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Sums of nested counts."""
    total: dict[str, dict[str, int]] = {}
    for part in parts:
        for key, counts in part.items():
            entry = total.setdefault(key, {})
            for name, count in counts.items():
                entry[name] = entry.get(name, 0) + count
    return dict(sorted(total.items()))


def waterfall(removed: dict[str, dict[str, int]], start: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each step: documents and bytes it removed, and the share of the bytes read."""
    lines = []
    for step, (label, paper) in STEPS.items():
        counts = removed.get(step, {"documents": 0, "bytes": 0})
        share = counts["bytes"] / max(start["bytes"], 1)
        lines.append({"step": step, "label": label, **counts, "share": round(share, 6), "paper_percent": paper})
    return lines


def describe(
    results: dict[str, Any], problems: Sequence[UnitReport], notes: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    """All facts of a run as JSON, from the results of its stages."""
    reports, filtered, written = results["read"], results["filter"], results["write"]
    matches = results["contamination"]
    read = add_counts([{"all": result["before"]} for result in filtered])["all"]
    removed = add_counts([result["removed"] for group in (filtered, written) for result in group])
    after = {
        "read": read,
        "filter": add_counts([{"all": result["after"]} for result in filtered])["all"],
        "write": add_counts([{"all": result["after"]} for result in written])["all"],
    }
    names = ("sources", "languages")
    groups = {name: add_counts([result[name] for result in written]) for name in names}
    before = {name: add_counts([report[name] for report in reports]) for name in names}
    masked = add_counts([{"masked": result["masked"]} for result in filtered]).get("masked", {})
    changes = {f"normalised: {key}": count for key, count in _sum(report["normalized"] for report in reports).items()}
    changes |= {f"masked: {kind}": count for kind, count in masked.items() if count}
    changes |= notes | {
        "boilerplate lines removed": sum(result["boilerplate_lines"] for result in filtered),
        "documents with low-quality sentences cut out": sum(result["cut_sentences_in"] for result in filtered),
        "copied paragraphs and sentences cut out": sum(result["cut_spans"] for result in written),
        "findings of the safety filter (work/filter/audit)": sum(result["findings"] for result in filtered),
        "documents that overlap with benchmarks": len(matches),
    }
    return {
        "raw_bytes": sum(report["raw_bytes"] for report in reports),
        "read": read,
        "written": after["write"],
        "waterfall": waterfall(removed, read),
        "stages": _stages(seconds, after, sum(report["raw_bytes"] for report in reports)),
        **{
            name: {
                key: {f"{field}_in": count for field, count in counts.items()} | groups[name].get(key, {})
                for key, counts in before[name].items()
            }
            for name in names
        },
        "problems": {
            "reasons": _sum(report["reasons"] for report in reports),
            "lost": _sum(report["lost"] for report in reports),
            "examples": [problem._asdict() for report in problems for problem in report.problems][:20],
        },
        "changes": {key: count for key, count in changes.items() if count},
        "samples": choose_samples([row for result in written for row in result["samples"]]),
        "clusters": results["dense"],
        "contamination": [list(match) for match in matches[:1000]],
    }


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    return add_counts([{"all": part} for part in parts]).get("all", {})


def _stages(seconds: dict[str, float], after: dict[str, dict[str, int]], raw_bytes: int) -> list[dict[str, Any]]:
    """Time, input and output of each stage; a stage that only decides has the same output as input."""
    current = {"documents": 0, "bytes": raw_bytes}
    lines = []
    for name, time in seconds.items():
        result = after.get(name, current)
        lines.append(
            {
                "name": name, "seconds": time, "documents_in": current["documents"], "bytes_in": current["bytes"],
                "documents_out": result["documents"], "bytes_out": result["bytes"],
            }
        )  # fmt: skip
        current = result
    return lines


def write_report(folder: Folder, facts: dict[str, Any]) -> None:
    """Writes the three files; report.json is the last one and marks the result as complete."""
    folder.write("waterfall.png", draw_waterfall(facts["waterfall"], facts["read"], facts["written"]))
    folder.write("report.md", render(facts).encode())
    folder.write_json("report.json", facts)


def draw_waterfall(lines: list[dict[str, Any]], start: dict[str, int], end: dict[str, int]) -> bytes:
    """A PNG of what each step removed from the bytes that were read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(lines) + 1.6))
    figure.subplots_adjust(left=0.3, right=0.98, top=0.98, bottom=0.12)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total = max(start["bytes"], 1)
    labels, left = ["read"], 100.0
    axes.barh([0], [100], color="#4c72b0")
    for place, line in enumerate(lines, 1):
        share = 100 * line["bytes"] / total
        left -= share
        axes.barh([place], [share], left=left, color="#c44e52")
        paper = "" if line["paper_percent"] is None else f"   (paper {line['paper_percent']} %)"
        axes.annotate(
            f"{share:.2f} %{paper}", (left + share, place), xytext=(4, 0), textcoords="offset points", va="center"
        )
        labels.append(line["label"])
    axes.barh([len(lines) + 1], [100 * end["bytes"] / total], color="#55a868")
    axes.annotate(
        f"{100 * end['bytes'] / total:.2f} %   (paper 31.68 %)", (100 * end["bytes"] / total, len(lines) + 1),
        xytext=(4, 0), textcoords="offset points", va="center",
    )  # fmt: skip
    axes.set_yticks(range(len(labels) + 1), [*labels, "written"])
    axes.invert_yaxis()
    axes.set_xlim(0, 140)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("share of the text read, %")
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def render(facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    start, end = facts["read"], facts["written"]
    parts = [
        "# Curation report\n",
        f"{start['documents']:,} documents, {_mb(start['bytes'])} of text read; {end['documents']:,} documents, "
        f"{_mb(end['bytes'])} ({end['bytes'] / max(start['bytes'], 1):.2%}) written.\n",
        "## Removed\n",
        "![waterfall](waterfall.png)\n",
        _table(
            ["step", "documents", "text", "share of the text read", "the paper's"],
            [
                [x["label"], f"{x['documents']:,}", _mb(x["bytes"]), f"{x['share']:.2%}", _percent(x["paper_percent"])]
                for x in facts["waterfall"]
            ],
        ),
    ]
    for title, key in (("By source", "sources"), ("By language", "languages")):
        rows = [
            [name, f"{c.get('documents_in', 0):,}", f"{c.get('documents', 0):,}", _mb(c.get("bytes_in", 0)),
             _mb(c.get("bytes", 0)), f"{c.get('bytes', 0) / max(c.get('bytes_in', 0), 1):.1%}"]
            for name, c in facts[key].items()
        ]  # fmt: skip
        parts += [f"## {title}\n", _table(["", "read", "written", "text read", "text written", "kept"], rows)]
    parts += ["## Clusters\n", _clusters(facts["clusters"])]
    parts += ["## Samples of removed documents\n", _samples(facts["samples"])]
    parts += ["## Raw data that gave no document\n", _problems(facts["problems"])]
    if facts["changes"]:
        changes = [[name, f"{count:,}"] for name, count in facts["changes"].items()]
        parts += ["## Changes\n", _table(["", ""], changes)]
    parts += [
        "## Time\n",
        _table(
            ["stage", "seconds", "MB/s of its input", "documents in", "out"],
            [
                [x["name"], f"{x['seconds']:.2f}", f"{x['bytes_in'] / max(x['seconds'], 1e-9) / 1e6:.0f}",
                 f"{x['documents_in']:,}", f"{x['documents_out']:,}"]
                for x in facts["stages"]
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def choose_samples(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A few removed documents of each step and each rule of the heuristics; `rows` are in the order of documents."""
    chosen: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        rule = rule_of(row["stage"], row["reason"])
        group = chosen.setdefault(row["stage"], {}).setdefault(rule, [])
        if len(group) < (_SAMPLES if not rule else 2):
            group.append({key: row[key] for key in ("id", "reason", "kept", "excerpt")})
    return {step: [row for _, rows in sorted(chosen[step].items()) for row in rows] for step in STEPS if step in chosen}


def _samples(samples: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    for step, rows in samples.items():
        parts.append(f"### {STEPS[step][0]}\n")
        table = [[_cell(r["id"]), _cell(r["reason"]), _cell(r["kept"] or ""), _cell(r["excerpt"])] for r in rows]
        parts.append(_table(["document", "reason", "kept instead", "begins with"], table))
    return "\n".join(parts) or "Nothing was removed.\n"


def _clusters(clusters: list[dict[str, Any]]) -> str:
    if not clusters:
        return "None were made.\n"
    rows = [
        [str(c["cluster"]), f"{c['documents']:,}", f"{c['score']:.2f}", _cell(", ".join(c["sources"])),
         _cell(", ".join(c["words"])), _cell(" / ".join(c["examples"]))]
        for c in clusters
    ]  # fmt: skip
    return _table(["cluster", "documents", "mean score", "sources", "distinctive words", "nearest its centre"], rows)


def _problems(problems: dict[str, Any]) -> str:
    if not problems["reasons"]:
        return "All raw data gave documents.\n"
    rows = [
        [_cell(reason), f"{count:,}", f"{problems['lost'].get(reason, 0):,}"]
        for reason, count in problems["reasons"].items()
    ]
    examples = [
        [_cell(p["file"]), str(p["line"]), _cell(p["reason"]), _cell(p["excerpt"])] for p in problems["examples"]
    ]
    return (
        _table(["reason", "places", "rows lost"], rows)
        + "\n"
        + _table(["file", "line or row", "reason", "begins with"], examples)
        + "\nAll of them are in `problems.parquet`.\n"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _cell(text: str) -> str:
    """A text as one line of a Markdown table, escaped and cut."""
    flat = " ".join(text.split())
    cut = flat[:_SAMPLE_CHARACTERS] + ("..." if len(flat) > _SAMPLE_CHARACTERS else "")
    return "".join(f"\\{c}" if c in "\\|`*_<>[]#" else c for c in cut)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value} %"
