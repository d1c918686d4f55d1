"""The report: one page that loads nothing, with every text escaped, and a page of the docs from the same JSON."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bc2_jax.demo.records import Record
from bc2_jax.demo.report import (
    About,
    fold_command,
    format_bytes,
    make_html,
    make_report,
    write_docs,
    write_report,
)
from bc2_jax.demo.stage import Picture, Result, Stage, Table

NASTY = '<script>alert(1)</script> & "q" | `c` <b>'
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def result(workdir: Path) -> Result:
    return Result(
        (f"Sentence {NASTY}",),
        (Table(f"Title {NASTY}", ("", "x|y"), (("a", "1"), (NASTY, "2"))),),
        (Picture("a/loss.png", f"Caption {NASTY}"), Picture("a/absent.png", "left out")),
        {"Sample": f"text {NASTY}\n```\nmore"},
        {"loss": 1.5},
    )


STAGES = [
    Stage("first", f"First {NASTY}", f"About {NASTY}", (("bc2", "train", "demo", "--x", "a b"),), ("a",), result),
    Stage("second", "Second", "", (("python", "-m", "m"),), ("b",), lambda _: Result(), typed=("curl 'x' <y>",)),
]
RECORDS = {
    "first": Record("f", [{"seconds": 61.2, "cpu_seconds": 100.0}], 2, "2026-01-01T00:00:00+00:00", 2_500_000),
    "second": Record("g", [{"seconds": 3.0, "cpu_seconds": 4.0}], 0, "2026-01-01T00:01:00+00:00", 1200),
}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loss.png").write_bytes(PIXEL)
    return tmp_path


@pytest.fixture
def report(workdir: Path) -> dict[str, Any]:
    return make_report(About("Title <i>", "Intro & more", "bc2 demo --all"), STAGES, RECORDS, workdir)


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and whether every one that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_json_has_everything(report: dict[str, Any]):
    first, second = report["stages"]
    assert first["commands"] == ["bc2 train demo --x 'a b'"] and second["commands"] == ["curl 'x' <y>"]
    assert (first["seconds"], first["cpu_seconds"], first["bytes"]) == (61.2, 100.0, 2_500_000)
    assert first["figures"] == {"loss": 1.5} and [p["path"] for p in first["pictures"]] == ["a/loss.png"]
    assert report["totals"] == {"seconds": 64.2, "cpu_seconds": 104.0, "bytes": 2_501_200}
    assert int(report["machine"]["cores"]) >= 1


def test_the_page_is_whole_escaped_and_loads_nothing(report: dict[str, Any], workdir: Path):
    page = make_html(report, workdir)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "b", "i", "link", "iframe"}  # of the texts, or what would load something
    sources = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert all(str(source).startswith(("data:", "#")) for source in sources) and "url(" not in page
    assert reader.text.count("<script>alert(1)</script>") == 8
    (picture,) = [attrs for tag, attrs in reader.tags if tag == "img"]
    assert base64.b64decode(str(picture["src"]).partition(",")[2]) == PIXEL
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    for text in ("1:01 min", "1:40 min", "2.5 MB", "1.2 kB", "Interruptions: 2.", "bc2 train demo --x 'a b'"):
        assert text in reader.text
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name == "href"]
    assert links == ["#first", "#second"] and {"first", "second"} <= {attrs.get("id") for _, attrs in reader.tags}


def test_files(report: dict[str, Any], workdir: Path):
    page = write_report(report, workdir)
    assert page.read_text(encoding="utf-8") == make_html(report, workdir)
    assert json.loads((workdir / "report.json").read_text(encoding="utf-8")) == report


def test_the_docs_say_the_same(report: dict[str, Any], workdir: Path, tmp_path: Path):
    page = tmp_path / "docs" / "demo.md"
    write_docs(report, workdir, page)
    text = page.read_text(encoding="utf-8")
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == report
    assert (page.parent / "demo_first_loss.png").read_bytes() == PIXEL and "](demo_first_loss.png)" in text
    assert "| all | 1:04 min | 1:44 min | 2.5 MB |" in text
    # Outside of code the texts mean nothing, and a table has as many cells in each row.
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    assert re.findall(r"(?<!\\)<", prose) == []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize(
    "command",
    ["bc2 curate a --out b", "bc2 train demo " + " ".join(f"--field-{i} 'value {i}'" for i in range(30)), "x " * 90],
)
def test_a_folded_command_is_the_same_command(command: str):
    folded = fold_command(command)
    assert shlex.split(folded.replace("\\\n", "")) == shlex.split(command)
    if " --" in command:
        assert max(map(len, folded.splitlines())) <= 100


def test_sizes():
    assert [format_bytes(n) for n in (0, 1500, 2_000_000)] == ["0.0 kB", "1.5 kB", "2.0 MB"]
