"""The whole pipeline on a small corpus with known copies and known faults."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.curate.config import CopiesConfig, CurationConfig, WeightsConfig
from bc2_jax.curate.contamination import ContaminationConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.pipeline import curate

TOOL = Path(__file__).parents[2] / "tools" / "curate.py"
ENGINE = Engine("native")
TEXT = """the of and to in river mountain harvest season village people water stone bridge market winter summer light
shadow travel letter garden history language method result measure table window forest evening morning simple ancient"""
WORDS = TEXT.split()
NOUNS = WORDS[5:-2]
LINKS = ["of the", "and the", "to the", "in the", "near a", "under the", "behind a", "with the", "from the", "above a"]


def sentence(rng: random.Random) -> str:
    """Words in an English order: curation drops words in random order."""
    rest = [f"{rng.choice(LINKS)} {rng.choice(NOUNS)}" for _ in range(rng.randint(3, 5))]
    return f"The {rng.choice(NOUNS)} {' '.join(rest)}."


def document(seed: int, sentences: int = 12) -> str:
    rng = random.Random(seed)
    return "\n\n".join(" ".join(sentence(rng) for _ in range(sentences // 3)) for _ in range(3))


def edited(text: str, seed: int, share: float) -> str:
    rng = random.Random(seed)
    words = text.split(" ")
    words = [rng.choice(WORDS) if rng.random() < share else word for word in words]
    return " ".join(["Indeed", *words])


SHARED = " ".join(sentence(random.Random(9000 + i)) for i in range(3))
QUESTION = " ".join(random.Random(777).choices(WORDS, k=30))


def rows() -> list[dict]:
    result = [{"id": f"d{i}", "text": document(i), "source": "web" if i % 3 else "books"} for i in range(60)]
    result += [{"id": f"exact{i}", "text": document(i) + "  \r\n", "source": "web"} for i in range(5)]
    result += [{"id": f"near{i}", "text": edited(document(i), i, 0.015), "source": "web"} for i in range(10, 15)]
    result += [{"id": f"edits{i}", "text": edited(document(i, 60), i, 0.03), "source": "web"} for i in range(100, 110)]
    result += [{"id": f"long{i}", "text": document(i, 60), "source": "web"} for i in range(100, 110)]
    result += [{"id": f"shared{i}", "text": f"{document(200 + i)}\n\n{SHARED}", "source": "web"} for i in range(3)]
    result += [{"id": "short", "text": "Too short.", "source": "web"}]
    result += [{"id": "leak", "text": f"{document(300)}\n\nThe question is: {QUESTION}.", "source": "web"}]
    return result


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    every = rows()
    third = len(every) // 3
    lines = [json.dumps(row).encode() + b"\n" for row in every]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:third]) + b'{"text": 5}\nnot json\n\xff\xfe\n')
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[third : 2 * third])))
    (folder / "c.jsonl").write_bytes(b"".join(lines[2 * third :]))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "bench.txt").write_text(QUESTION)
    return folder


def config(raw: Path) -> CurationConfig:
    return CurationConfig(contamination=ContaminationConfig(files=(str(raw / "bench.txt"),)))


def inputs(raw: Path) -> list[str]:
    return [str(raw / name) for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl", "empty.jsonl")]


def run(raw: Path, out: Path, settings: CurationConfig) -> dict:
    return curate(inputs(raw), str(out), settings, ENGINE, lambda *_: None)


@pytest.fixture(scope="module")
def result(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    return run(raw, out, config(raw)), out


def read(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def hashes(out: Path, *names: str) -> dict[str, str]:
    files = [file for name in names for file in sorted((out / name).rglob("*")) if file.is_file()]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_document_is_written_or_named(raw, result):
    report, out = result
    written, removed = read(out / "documents"), read(out / "removed")
    assert sorted(row["id"] for row in written + removed) == sorted(row["id"] for row in rows())
    assert report["read"]["documents"] == len(rows())
    assert report["written"]["documents"] == len(written)
    by_id = {row["id"]: row for row in removed}
    assert {name for name in by_id if by_id[name]["stage"] == "exact"} == {f"exact{i}" for i in range(5)}
    assert all(by_id[f"exact{i}"]["kept"] == f"d{i}" for i in range(5))
    assert all(
        by_id[f"near{i}"]["stage"] in ("near", "dense") and by_id[f"near{i}"]["kept"] == f"d{i}" for i in range(10, 15)
    )
    assert all(re.search(r": \d+% of their shingles are the same$", by_id[f"near{i}"]["reason"]) for i in range(10, 15))
    found = [i for i in range(100, 110) if by_id.get(f"long{i}", {}).get("kept") == f"edits{i}"]
    assert len(found) >= 8
    assert by_id["short"]["stage"] == "heuristics" and "limit" in by_id["short"]["reason"]
    assert by_id["leak"]["stage"] == "contamination" and by_id["leak"]["kept"] == "bench.txt:1"
    assert by_id["leak"]["reason"] == (
        f"it overlaps with a benchmark item: 100% of its n-grams, such as {' '.join(QUESTION.split()[:13])!r}"
    )


def test_the_waterfall_adds_up_to_the_byte(result):
    report, out = result
    size = sum(len(row["text"].encode()) for row in read(out / "documents"))
    assert report["written"]["bytes"] == size
    assert report["read"]["bytes"] - sum(line["bytes"] for line in report["waterfall"]) == size
    assert report["read"]["documents"] - sum(line["documents"] for line in report["waterfall"]) == len(
        read(out / "documents")
    )
    for group in ("sources", "languages"):
        assert sum(counts.get("bytes", 0) for counts in report[group].values()) == size


def test_a_shared_paragraph_stays_once(result):
    texts = [row["text"] for row in read(result[1] / "documents") if row["id"].startswith("shared")]
    assert len(texts) == 3 and sum(SHARED in text for text in texts) == 1
    assert [text.split("\n\n")[0] for text in texts] == [document(200 + i).split("\n\n")[0] for i in range(3)]


def test_columns_and_weights(result):
    written = read(result[1] / "documents")
    assert list(written[0]) == ["id", "text", "source", "language", "cluster", "score", "weight"]
    assert {row["source"] for row in written} == {"web", "books"} and {row["language"] for row in written} == {"en"}
    assert all(0 <= row["score"] <= 1 and row["weight"] > 0 and row["cluster"] >= 0 for row in written)


def test_the_same_documents_as_json_lines(result):
    lines = []
    for file in sorted((result[1] / "jsonl").glob("*.jsonl.zst")):
        lines += zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read().decode().splitlines()
    assert [json.loads(line) for line in lines] == read(result[1] / "documents")


def test_faults_are_named_by_file_and_line(result):
    report, out = result
    problems = pq.read_table(out / "problems.parquet").to_pylist()
    places = {(p["file"], p["line"]) for p in problems}
    third = len(rows()) // 3
    assert places == {("a.jsonl", third + 1), ("a.jsonl", third + 2), ("a.jsonl", third + 3), ("empty.jsonl", 0)}
    assert sum(report["problems"]["lost"].values()) == 3
    text = (out / "report.md").read_text()
    assert "a.jsonl" in text and "the file is empty" in text and "exact copies" in text
    assert (out / "waterfall.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_input_gives_the_same_bytes(raw, result, tmp_path):
    run(raw, tmp_path / "again", config(raw))
    names = ("documents", "removed", "jsonl")
    assert hashes(tmp_path / "again", *names) == hashes(result[1], *names)
    assert (tmp_path / "again" / "waterfall.png").read_bytes() == (result[1] / "waterfall.png").read_bytes()


def test_only_what_changed_is_done_again(raw, tmp_path):
    begun: list[str] = []

    def again(settings):
        begun.clear()
        return curate(inputs(raw), str(tmp_path), settings, ENGINE, lambda stage, *_: begun.append(stage))

    first = again(CurationConfig())
    stages = list(dict.fromkeys(begun))
    assert stages == ["read", "exact", "filter", "near", "contamination", "dense", "spans", "write"]
    before = hashes(tmp_path, "documents")
    assert again(CurationConfig())["written"] == first["written"] and begun == []
    again(CurationConfig(weights=WeightsConfig(score_strength=0.0)))
    assert list(dict.fromkeys(begun)) == ["dense", "spans", "write"]
    after = again(CurationConfig(copies=CopiesConfig(near=False, sentence_copies=2), weights=WeightsConfig()))
    assert list(dict.fromkeys(begun)) == ["near", "contamination", "dense", "spans", "write"]
    assert after["waterfall"][4]["documents"] == 0
    with pytest.raises(ValueError, match=r"^weights\.sources = 'bokks' is not valid: sources of the documents are "):
        again(CurationConfig(weights=WeightsConfig(sources={"bokks": 2.0})))
    again(CurationConfig())
    assert hashes(tmp_path, "documents") == before


def test_ids_that_come_twice_and_files_that_are_skipped_are_counted(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [{"id": "same", "text": document(i)} for i in range(3)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.pdf").write_text("x")
    report = curate([str(folder)], str(tmp_path / "out"), CurationConfig(), ENGINE, lambda *_: None)
    assert report["changes"]["documents whose id an earlier one has"] == 2
    assert report["changes"]["files that were skipped"] == 1
    assert "notes.pdf" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("everything", ["heuristics", "contamination"])
def test_nothing_is_left(tmp_path, capsys, everything):
    from bc2_jax.cli.curate import main

    text = "Too short." if everything == "heuristics" else document(1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "bench.txt").write_text(text.replace("\n", " "))
    out = tmp_path / "out"
    assert (
        main([str(tmp_path / "a.jsonl"), "--out", str(out), "--contamination.files", str(tmp_path / "bench.txt")]) == 0
    )
    assert "No document is left: the table above says which step took how many." in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["written"] == {"documents": 0, "bytes": 0} and report["clusters"] == []
    assert [row["stage"] for row in read(out / "removed")] == [everything] and not (out / "documents").exists()


def test_programs_under_one_licence_are_no_copies(tmp_path):
    licence = "".join(f"# {line}\n" for line in document(7, 6).split("\n"))
    header = f"# Copyright 2031 The Example Authors.\n#\n{licence}\n"
    bodies = [
        "".join(
            f"def {verb}_{noun}(value):\n    return {verb}(value, '{noun}', {i})\n\n\n" for noun in WORDS[i : i + 4]
        )
        for i, verb in enumerate(["read", "write", "find", "sort"])
    ]
    rows = [
        {"id": f"p{i}", "text": header + body, "source": "py"} for i, body in enumerate([*bodies, bodies[2] + "\n#"])
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = curate([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), CurationConfig(), ENGINE, lambda *_: None)
    kept = {row["id"] for row in read(tmp_path / "out" / "documents")}
    assert kept == {"p0", "p1", "p2", "p3"} and report["waterfall"][4]["documents"] == 1


SPECIAL = st.text(st.sampled_from("[]*?{}!\\#%20 ~$|&'好a"), min_size=1, max_size=6)


@settings(max_examples=6, deadline=None)
@given(SPECIAL, SPECIAL)
def test_a_path_is_no_pattern_and_no_url(tmp_path_factory, parent, name):
    """A folder with any name and any parent is read itself, not a folder that its name matches as a pattern."""
    root = tmp_path_factory.mktemp("paths") / f"x{parent}"
    raw, out = root / f"raw{name}", root / f"out{name}"
    raw.mkdir(parents=True)
    rows = [{"id": f"d{i}", "text": document(i % 3)} for i in range(4)]
    (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for again in range(2):
        # What a pattern or a decoded name could mean has other documents.
        for decoy in ("run1", "outa", "out ", "out2", "out0"):
            if again and decoy != out.name:
                shutil.copytree(out, root / decoy, dirs_exist_ok=True)
        config = CurationConfig(weights=WeightsConfig(cluster_exponent=0.1 * again))
        report = curate([str(raw)], str(out), config, ENGINE, lambda *_: None)
        assert report["written"]["documents"] == len(read(out / "documents")) == 3
        assert report["waterfall"][0]["documents"] == 1


def test_a_path_that_is_no_text_is_refused_before_anything_is_read(raw, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(ValueError, match="folder = .* is not valid: the path of a folder .* must be UTF-8"):
        curate(inputs(raw), out, CurationConfig(), ENGINE, lambda *_: None)
    assert os.listdir(tmp_path) == []


def test_a_changed_file_of_the_same_size_is_read_again(tmp_path):
    raw = tmp_path / "a.jsonl"
    for text in ("first", "other"):
        raw.write_text(json.dumps({"text": f"{text} {document(1)}"}) + "\n")
        curate([str(raw)], str(tmp_path / "out"), CurationConfig(), ENGINE, lambda *_: None)
        assert read(tmp_path / "out" / "documents")[0]["text"].startswith(text)


def test_nothing_of_anyone_else_is_overwritten(raw, tmp_path):
    def refused(out, message):
        with pytest.raises(ValueError, match=message):
            curate([str(raw / "a.jsonl"), str(tmp_path / "raw")], str(out), CurationConfig(), ENGINE, lambda *_: None)

    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "b.txt").write_text(document(3))
    refused(tmp_path / "raw" / "out", "--out = .* is not valid: it must not lie in the raw folder")
    for name in ("documents", "thesis"):
        home = tmp_path / f"home-{name}"
        (home / name).mkdir(parents=True)
        (home / name / "mine.txt").write_text("mine")
        refused(home, f"it must be an empty folder or one of an earlier run, and has {name}")
        assert (home / name / "mine.txt").read_text() == "mine"
    (tmp_path / "made" / "documents").mkdir(parents=True)
    (tmp_path / "made" / "report.json").write_text("{}")
    (tmp_path / "made" / "documents" / "notes.parquet").write_text("mine")
    refused(tmp_path / "made", "has documents/notes.parquet")


def command(raw: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(TOOL), *inputs(raw), "--out", str(out), *more]


def test_killed_and_started_again(raw, result, tmp_path):
    """A run killed at the beginning of several stages and resumed gives the bytes of one run."""
    out = tmp_path / "out"
    more = ("--contamination.files", str(raw / "bench.txt"))
    for stage in ("read", "near", "write"):
        process = subprocess.Popen(command(raw, out, *more), stderr=subprocess.PIPE)
        while not (out / "work" / stage / "begun.json").exists() and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "report.json").exists()
    done = subprocess.run(command(raw, out, *more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written" in done.stderr and "4 places in the raw files" in done.stderr
    names = ("documents", "removed", "jsonl")
    assert hashes(out, *names) == hashes(result[1], *names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{raw}/missing"], "paths = '{raw}/missing' is not valid: there is no such file or folder."),
        (["{raw}/a.jsonl", "--runner", "spark"], "--runner = 'spark' is not valid: legal values are native, ray"),
        (["{raw}/empty.jsonl"], "is not valid: no document could be read"),
        (["{raw}/a.jsonl", "--quality.model", "{raw}/no.npz"], "quality.model = '{raw}/no.npz' is not valid"),
        (["{raw}/a.jsonl", "--contamination.files", "{raw}/x.txt"], "contamination.files = '{raw}/x.txt' is not valid"),
    ],
)  # fmt: skip
def test_one_sentence_for_what_is_not_valid(raw, tmp_path, capsys, arguments, message):
    sys.path.insert(0, str(TOOL.parents[1]))
    from bc2_jax.cli.curate import main

    given = [argument.format(raw=raw) for argument in arguments]
    assert main([*given, "--out", str(tmp_path / "out")]) == 1
    assert message.format(raw=raw) in capsys.readouterr().err
    assert not (tmp_path / "out" / "documents").exists()


def test_settings_come_from_a_file_and_the_command_line(tmp_path):
    from bc2_jax.cli.curate import parse_arguments

    file = tmp_path / "c.py"
    file.write_text(
        "from bc2_jax.curate.config import *\n"
        "def config():\n    return CurationConfig(copies=CopiesConfig(sentence_copies=7), jsonl=False)\n"
    )
    options = parse_arguments(["a", "b", "--out", "o", "--config", str(file), "--copies.least-left", "0.5"])
    assert options.raw == ("a", "b") and options.out == "o"
    expected = dataclasses.replace(CurationConfig().copies, sentence_copies=7, least_left=0.5)
    assert options.settings == dataclasses.replace(CurationConfig(), copies=expected, jsonl=False)
