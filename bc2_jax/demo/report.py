"""The report of stages: one JSON value, from which the HTML page and the page of the docs are written."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.data.processes import num_cores
from bc2_jax.demo.progress import format_seconds
from bc2_jax.demo.records import Record
from bc2_jax.demo.stage import Stage, typed_commands
from bc2_jax.files import replaced

JSON_NAME, HTML_NAME = "report.json", "report.html"
_WIDEST_COMMAND = 100
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6370; --back: #ffffff; --card: #f4f5f7; --line: #d9dce1; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #9aa1ac; --back: #16181c; --card: #22252b; --line: #363a42; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; }
a { color: inherit; } .soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0; }
caption { text-align: left; padding: .25rem 0; } th, td { text-align: right; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td { overflow-wrap: break-word; }
pre { background: var(--card); padding: .75rem; border-radius: .5rem; overflow-x: auto; font-size: .8125rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .5rem; }
"""


@dataclasses.dataclass(frozen=True)
class About:
    """What the report says of the whole."""

    title: str
    intro: str
    command: str
    """What makes it."""


def make_report(about: About, stages: Sequence[Stage], records: Mapping[str, Record], workdir: Path) -> dict[str, Any]:
    """Everything that the pages show, as JSON: of each stage its commands, time, size and result.

    Pictures that a stage has not made are left out.
    """
    found = []
    for stage in stages:
        record, result = records[stage.name], stage.read(workdir)
        pictures = [picture for picture in result.pictures if (workdir / picture.path).is_file()]
        found.append(
            {
                "name": stage.name, "title": stage.title, "about": stage.about, "commands": typed_commands(stage),
                "seconds": round(record.seconds, 1), "cpu_seconds": round(record.cpu_seconds, 1),
                "bytes": record.bytes, "interruptions": record.interruptions, "finished": record.finished,
                **dataclasses.asdict(dataclasses.replace(result, pictures=tuple(pictures))),
            }
        )  # fmt: skip
    totals = {name: round(sum(one[name] for one in found), 1) for name in ("seconds", "cpu_seconds", "bytes")}
    value = {
        **dataclasses.asdict(about), "workdir": str(workdir), "machine": describe_machine(), "totals": totals,
        "stages": found,
    }  # fmt: skip
    return dict(json.loads(json.dumps(value)))  # as it will be read again


def describe_machine() -> dict[str, str]:
    """Cores, and versions of what computes."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    load = f"{os.getloadavg()[0]:.1f}"
    return {
        "cores": str(num_cores()), "load at the end": load, "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), **versions,
    }  # fmt: skip


def write_report(report: Mapping[str, Any], workdir: Path) -> Path:
    """Writes report.json and report.html to the workdir; returns the latter's path."""
    page = workdir / HTML_NAME
    for path, text in (
        (workdir / JSON_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        (page, make_html(report, workdir)),
    ):
        with replaced(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return page


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(stage, time, CPU time, size) of each stage, and of all."""
    named = [*((stage["title"], stage) for stage in report["stages"]), ("all", report["totals"])]
    return [
        (title, format_seconds(one["seconds"]), format_seconds(one["cpu_seconds"]), format_bytes(one["bytes"]))
        for title, one in named
    ]


SUMMARY = ("stage", "time", "CPU time", "size")


def format_bytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def fold_command(command: str) -> str:
    """A long command as several lines that a shell reads as one: broken before options."""
    if len(command) <= _WIDEST_COMMAND:
        return command
    lines = [""]
    for part in re.split(r" (?=--?\w)", command):
        if lines[-1] and len(lines[-1]) + len(part) > _WIDEST_COMMAND - 4:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return " \\\n  ".join(lines)


# ---------------------------------------------------------------------------------------------------------------- HTML


def make_html(report: Mapping[str, Any], workdir: Path) -> str:
    """One self-contained page: pictures are in it, it loads nothing."""
    e = html.escape
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    body = [
        f"<h1>{e(report['title'])}</h1>", f"<p>{e(report['intro'])}</p>", f"<pre>{e(report['command'])}</pre>",
        f'<p class="soft">{e(machine)}. The commands below are typed in {e(report["workdir"])}.</p>',
        _html_table("", SUMMARY, summary_rows(report), [f"#{stage['name']}" for stage in report["stages"]]),
    ]  # fmt: skip
    for stage in report["stages"]:
        body += _html_stage(stage, workdir)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{e(report['title'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body)
        + "\n</body>\n</html>\n"
    )  # fmt: skip


def _html_stage(stage: Mapping[str, Any], workdir: Path) -> Iterable[str]:
    e = html.escape
    yield f'<h2 id="{e(stage["name"])}">{e(stage["title"])}</h2>'
    yield f"<p>{e(stage['about'])}</p>"
    yield "".join(f"<pre>{e(fold_command(command))}</pre>" for command in stage["commands"])
    again = f" Interruptions: {stage['interruptions']}." if stage["interruptions"] else ""
    yield (
        f'<p class="soft">{format_seconds(stage["seconds"])}, {format_seconds(stage["cpu_seconds"])} of CPU time, '
        f"{format_bytes(stage['bytes'])}.{again}</p>"
    )
    yield from (f"<p>{e(sentence)}</p>" for sentence in stage["sentences"])
    yield from (_html_table(table["title"], table["headers"], table["rows"]) for table in stage["tables"])
    for title, text in stage["texts"].items():
        yield f"<h3>{e(title)}</h3><pre>{e(text)}</pre>"
    for picture in stage["pictures"]:
        data = base64.b64encode((workdir / picture["path"]).read_bytes()).decode()
        caption = e(picture["caption"])
        yield (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _html_table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], links: Sequence[str] = ()
) -> str:  # fmt: skip
    """`links`: where the first cells of the first rows lead."""
    e = html.escape
    head = "".join(f"<th>{e(header)}</th>" for header in headers)
    lines = []
    for index, (first, *others) in enumerate(rows):
        text = f'<a href="{e(links[index])}">{e(first)}</a>' if index < len(links) else e(first)
        lines.append(f"<tr><td>{text}</td>" + "".join(f"<td>{e(cell)}</td>" for cell in others) + "</tr>")
    caption = f"<caption>{e(title)}</caption>" if title else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{caption}{body}</table></div>'


# ------------------------------------------------------------------------------------------------------------ Markdown


def write_docs(report: Mapping[str, Any], workdir: Path, page: Path) -> None:
    """Writes the report as a Markdown page; beside it its JSON and its pictures, as PAGE_STAGE_NAME.png."""
    lines = [
        f"# {_escape(report['title'])}", "", _escape(report["intro"]), "",
        f"Written by `{report['command']} --docs docs/{page.name}`; not edited by hand.", "",
        "```", report["command"], "```", "",
        "Measured on " + ", ".join(f"{name} {value}" for name, value in report["machine"].items()) + ":", "",
        *_markdown_table(SUMMARY, summary_rows(report)), "",
        f"The commands below are typed in `{report['workdir']}`.", "",
    ]  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    for stage in report["stages"]:
        lines += [f"## {_escape(stage['title'])}", "", _escape(stage["about"]), ""]
        if stage["commands"]:
            lines += ["```", *(fold_command(command) for command in stage["commands"]), "```", ""]
        for sentence in stage["sentences"]:
            lines += [_escape(sentence), ""]
        for table in stage["tables"]:
            lines += [f"{_escape(table['title'])}:", "", *_markdown_table(table["headers"], table["rows"]), ""]
        for title, text in stage["texts"].items():
            lines += [f"{_escape(title)}:", "", "```text", text.replace("```", "'''"), "```", ""]
        for picture in stage["pictures"]:
            name = f"{page.stem}_{stage['name']}_{Path(picture['path']).name}"
            shutil.copyfile(workdir / picture["path"], page.parent / name)
            lines += [f"![{_escape(picture['caption'])}]({name})", ""]
    for path, text in (
        (page, "\n".join(lines).rstrip()),
        (page.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False)),
    ):
        with replaced(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def _markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head, *cells = (f"| {' | '.join(map(_escape, row))} |" for row in (headers, *rows))
    return [head, f"| {' | '.join(['---', *['---:'] * (len(headers) - 1)])} |", *cells]


def _escape(text: str) -> str:
    """Text in which Markdown and HTML mean nothing, on one line."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))
