"""The whole way from files of conversations to batches, and what is said about what is not in them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bc2_jax.align import row_preparation
from bc2_jax.align.chat import encode_conversation
from bc2_jax.align.preparation_settings import RowSettings
from bc2_jax.align.row_preparation import prepare_chat
from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data.inspection import inspect_sources
from bc2_jax.data.loader import describe_mixture, make_train_loader, make_validation_batches
from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.data.row_stream import find_sources, read_document, stream_tokens
from bc2_jax.files import InUse, lock
from bc2_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_chat.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
LENGTH = 48
Messages = list[dict[str, str]]


def talk(*texts: str, system: str | None = None) -> Messages:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def samples_of(rows: Path, tokenizer: Tokenizer, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each segment of all batches of a split, sorted."""
    data = DataConfig(
        sources=(SourceConfig(path=str(rows)),), tokenizer=str(tokenizer.path),
        sequence_length=load_manifest(rows).sequence_length, global_batch_size=1,
    )  # fmt: skip
    count = load_manifest(rows).split("train").rows
    loader = make_train_loader(data, process_index=0, process_count=1)
    batches = [loader[i] for i in range(count)] if split == "train" else list(make_validation_batches(data, 1))
    samples = []
    for batch in batches:
        for segment in range(1, int(batch["segment_ids"].max()) + 1):
            here = batch["segment_ids"] == segment
            assert batch["positions"][here].tolist() == list(range(int(here.sum())))
            samples.append((batch["input_ids"][here].tolist(), batch["labels"][here].tolist()))
        assert set(batch["labels"][batch["segment_ids"] == 0].tolist()) <= {-100}
    return sorted(samples)


def encoded(conversations: list[Messages], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    return sorted(encode_conversation(tokenizer, messages) for messages in conversations)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def conversations() -> list[Messages]:
    rng = np.random.default_rng(0)
    words = ["how", "is", "the", "file", "open", "json", "汉字", "return", "None", "list", "of", "strings"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 5)))

    return [talk(*(f"{i} {text()}" for _ in range(2 * rng.integers(1, 4)))) for i in range(60)]


def spell(messages: Messages) -> Messages:
    return [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]


ALL = RowSettings(max_length=LENGTH, validation_fraction=0)
PLAIN = [talk("What is 2 + 2?", "4."), talk("Hello", "Hi!", "More?", "汉字, more.")]
FORMATS: dict[str, tuple[str, Callable[[Messages], Any], list[Messages]]] = {
    "released": (
        "released",
        lambda m: {"conversations": spell(m)},
        PLAIN,
    ),
    "sharegpt": (
        "ShareGPT",
        lambda m: {
            "system": m[0]["content"],
            "conversations": spell(m[1:]),
        },
        [talk("What?", "That.", system="Be brief."), talk("a", "b", "c", "d", system="你好")],
    ),
    "messages": ("OpenAI messages", lambda m: {"messages": m}, [*PLAIN, talk("x", "y", system="s")]),
    "alpaca": (
        "Alpaca",
        lambda m: {
            "instruction": m[-2]["content"], "input": "", "output": m[-1]["content"],
            "history": [[m[i]["content"], m[i + 1]["content"]] for i in range(0, len(m) - 2, 2)],
        },
        PLAIN,
    ),
    "completion": (
        "prompt-completion (text)", lambda m: {"prompt": m[0]["content"], "completion": m[1]["content"]}, PLAIN[:1]
    ),
    "preference": (
        "preference (messages)",
        lambda m: {"prompt": m[:-1], "chosen": m[-1:], "rejected": [{"role": "assistant", "content": "No."}]},
        PLAIN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_batches(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    form, write, expected = FORMATS[name]
    records = [write(messages) for messages in expected]
    if name == "released":
        (tmp_path / "data.json").write_text(json.dumps(records, indent=1), "utf-8")
    elif name == "alpaca":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data.parquet")
    else:
        lines = write_lines(tmp_path / "data", records)
        (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
        lines.unlink()
    counts = prepare_chat([tmp_path], tokenizer.path, tmp_path / "rows", ALL)
    assert [file.formats for file in counts.files] == [{form: len(expected)}] and not counts.invalid
    assert samples_of(tmp_path / "rows", tokenizer) == encoded(expected, tokenizer)
    assert counts.pairs == (len(expected) if name == "preference" else 0)


def test_counts_are_those_of_the_rows(conversations: list[Messages], tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in conversations])
    rows, settings = tmp_path / "rows", RowSettings(max_length=LENGTH, validation_fraction=0.2, rows_per_file=5)
    counts = prepare_chat([file], tokenizer.path, rows, settings)
    manifest = load_manifest(rows)
    assert (manifest.kind, manifest.sequence_length, manifest.documents) == ("chat", LENGTH, len(conversations))
    assert counts.shortened and counts.dropped_rounds >= counts.shortened and not counts.dropped
    found = samples_of(rows, tokenizer) + samples_of(rows, tokenizer, "validation")
    assert len(found) == counts.samples == manifest.train.documents + manifest.validation.documents
    assert sum(len(ids) for ids, _ in found) == counts.tokens
    assert sum(label != -100 for _, labels in found for label in labels) == counts.targets
    assert sum(ids.count(196) for ids, _ in found) == counts.turns
    assert counts.rows == len(read_rows(rows, "train")) + len(read_rows(rows, "validation"))
    assert counts.padding == counts.rows * LENGTH - counts.tokens
    assert 0.05 < counts.held_out / counts.samples < 0.4 and counts.held_out == manifest.validation.documents
    # Long ones were shortened from the front, so that all of them end; short ones are whole.
    assert all(ids[-1] == 2 for ids, _ in found)
    whole = [sample for sample in encoded(conversations, tokenizer) if len(sample[0]) <= LENGTH]
    assert len(whole) == len(conversations) - counts.shortened and all(sample in found for sample in whole)
    problems = (rows / "problems.txt").read_text().splitlines()
    assert len(problems) == counts.shortened
    assert re.fullmatch(
        r".*data\.jsonl:\d+: its \d oldest round\(s\) are left out, to fit max_length = 48", problems[0]
    )
    saved = json.loads((rows / "conversations.json").read_text())
    assert (saved["samples"], saved["turns"], saved["files"][0]["formats"]) == (
        counts.samples, counts.turns, {"OpenAI messages": 60}
    )  # fmt: skip


def test_questions_are_the_held_out_conversations(
    conversations: list[Messages], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """... whatever the order and the files; other answers to a question are on its side."""
    twice = [*conversations, *(talk(messages[0]["content"], "Another answer.") for messages in conversations)]
    write_lines(tmp_path / "a.jsonl", [{"messages": messages} for messages in twice])
    write_lines(tmp_path / "b1.jsonl", [{"messages": messages} for messages in twice[70:][::-1]])
    write_lines(tmp_path / "b2.jsonl", [{"messages": messages} for messages in twice[:70]])
    asked = []
    for name in ("a", "b"):
        files = sorted(tmp_path.glob(f"{name}*.jsonl"))
        settings = RowSettings(max_length=200, validation_fraction=0.15)
        prepare_chat(files, tokenizer.path, tmp_path / name, settings)
        asked.append([json.loads(line)["messages"] for line in (tmp_path / name / "questions.jsonl").open()])
        assert encoded(asked[-1], tokenizer) == samples_of(tmp_path / name, tokenizer, "validation")
        trained = {messages[0]["content"] for messages in twice if messages not in asked[-1]}
        assert trained and not trained & {messages[0]["content"] for messages in asked[-1]}
    assert sorted(map(str, asked[0])) == sorted(map(str, asked[1])) and len(asked[0]) > 4


def test_at_least_one_sample_is_held_out_if_any(tokenizer: Tokenizer, tmp_path: Path, caplog) -> None:
    file = write_lines(tmp_path / "few.jsonl", [{"messages": talk(f"Question {i}", "Yes.")} for i in range(5)])
    settings = RowSettings(max_length=LENGTH, validation_fraction=1e-9)
    assert prepare_chat([file], tokenizer.path, tmp_path / "few", settings).held_out == 1
    assert len((tmp_path / "few" / "questions.jsonl").read_text().splitlines()) == 1
    file = write_lines(tmp_path / "same.jsonl", [{"messages": talk("Who are you?", f"I am {i}.")} for i in range(5)])
    assert prepare_chat([file], tokenizer.path, tmp_path / "same", settings).held_out == 0
    assert "nothing is held out" in caplog.text and not (tmp_path / "same" / "questions.jsonl").exists()
    assert load_manifest(tmp_path / "same").train.documents == 5


def test_what_can_not_be_used_is_named_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good, long = talk("a", "b"), talk("a", "b" * 60)
    records = [
        {"messages": good}, {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [*good, {"role": "assistant", "content": "c"}]}, {"messages": talk("", "b")},
        {"prompt": "a", "chosen": "same", "rejected": "same"}, {"messages": talk("a", "\ud800")},
        {"messages": talk("c", "<reserved_106>d</s>", "unanswered")}, {"messages": long},
        {"messages": talk("q" * 80, "d")},
    ]  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = prepare_chat([file], tokenizer.path, tmp_path / "rows", ALL)
    assert sum(counts.invalid.values()) == 5 == counts.files[0].invalid and counts.unanswered == 1
    assert counts.dropped == {"no target within max_length": 1} and counts.cut == 1 and counts.cut_tokens > 0
    problems = (tmp_path / "rows" / "problems.txt").read_text().splitlines()
    assert re.findall(r"data\.jsonl:(\d+): ", "\n".join(problems)) == list("23456789")
    assert sum(": left out: " in problem for problem in problems) == 6
    # A role that text spells is not a role.
    forged = encoded([good, talk("c", "<reserved_106>d</s>")], tokenizer)
    assert all(sample in samples_of(tmp_path / "rows", tokenizer) for sample in forged)
    manifest = load_manifest(tmp_path / "rows")
    assert (manifest.documents, manifest.invalid_documents, manifest.empty_documents) == (9, 5, 1)

    dropped = prepare_chat(
        [file], tokenizer.path, tmp_path / "dropped", RowSettings(max_length=LENGTH, truncation="drop")
    ).dropped
    assert dropped == {"longer than max_length": 2}
    with pytest.raises(ValueError, match=r"max_invalid = 1 is not valid: one more can't be used: .*data\.jsonl:3: "):
        prepare_chat([file], tokenizer.path, tmp_path / "few", RowSettings(max_length=LENGTH, max_invalid=1))
    write_lines(file, records[1:5])
    with pytest.raises(
        ValueError, match=r"DATA is not valid: no sample is left to train on \(1 x a system text alone, "
    ):
        prepare_chat([file], tokenizer.path, tmp_path / "none", ALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "dropped", "rows"]


def test_arguments_that_are_not_legal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for arguments, message in (
        ({"max_length": 0}, "max_length = 0 is not valid: it must be positive"),
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0 is not valid: it must be in \[0, 1\)"),
        ({"truncation": "left"}, "truncation = 'left' is not valid: it must be rounds, right, drop"),
        ({"max_invalid": -1}, "max_invalid = -1 is not valid"),
    ):
        with pytest.raises(ValueError, match=message):
            RowSettings(**arguments)
    file = write_lines(tmp_path / "data.jsonl", [{"messages": talk("a", "b")}])
    with pytest.raises(ValueError, match="processes = 0 is not valid"):
        prepare_chat([file], tokenizer.path, tmp_path / "rows", ALL, processes=0)
    with pytest.raises(ValueError, match=r"DATA = .* is not valid: there is no such file"):
        prepare_chat([tmp_path / "no"], tokenizer.path, tmp_path / "rows", ALL)


def test_the_same_bytes_again_and_on_two_processes(
    conversations: list[Messages], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = [{"messages": messages} for messages in conversations]
    file = write_lines(tmp_path / "data.jsonl", [*records[:7], "no record", *records[7:]])
    settings = RowSettings(max_length=LENGTH, validation_fraction=0.2)
    prepare_chat([file], tokenizer.path, tmp_path / "rows", settings)
    before = content(tmp_path / "rows")
    monkeypatch.setattr(row_preparation, "_SHARED_BYTES", 0)
    monkeypatch.setattr(row_preparation, "_BATCH_CHARACTERS", 300)
    prepare_chat([file], tokenizer.path, tmp_path / "rows", settings, processes=2, overwrite=True)
    assert content(tmp_path / "rows") == before


def test_only_packed_rows_are_replaced_and_only_by_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, rows = write_lines(tmp_path / "data.jsonl", [{"messages": talk("a", "b")}]), tmp_path / "rows"
    leftover = tmp_path / ".rows.conversations.incomplete"
    leftover.mkdir()
    (leftover / "tokens").write_bytes(b"of a run that was killed")
    prepare_chat([file], tokenizer.path, rows, ALL)
    before = content(rows)
    with pytest.raises(FileExistsError, match="it exists; choose another or pass overwrite"):
        prepare_chat([file], tokenizer.path, rows, ALL)
    (rows / "mine.txt").write_text("notes")
    with pytest.raises(FileExistsError, match=r"it also has mine\.txt, which packing did not write"):
        prepare_chat([file], tokenizer.path, rows, ALL, overwrite=True)
    (rows / "mine.txt").unlink()
    with lock(tmp_path / ".rows.lock", "rows"), pytest.raises(InUse, match="is in use by process"):
        prepare_chat([file], tokenizer.path, rows, ALL, overwrite=True)
    write_lines(file, [{"messages": [{"role": "system", "content": "nothing to learn"}]}])
    with pytest.raises(ValueError, match="no sample is left"):
        prepare_chat([file], tokenizer.path, rows, ALL, overwrite=True)
    assert content(rows) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "rows"]


def test_samples_are_the_documents_of_a_stream(
    conversations: list[Messages], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Counts, lengths, places and copies between the splits are found as in text; no flag shows."""
    copied = [*conversations, [*conversations[0][:1], *conversations[5][1:]]]
    file = write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in copied])
    settings = RowSettings(max_length=LENGTH, validation_fraction=0.3, truncation="right")
    counts = prepare_chat([file], tokenizer.path, tmp_path / "rows", settings)
    assert counts.cut
    (source,) = find_sources([tmp_path])
    found = inspect_sources([source], n=5)
    assert found.differences == () and sum(split.documents for split in found.splits) == counts.samples
    expected = samples_of(tmp_path / "rows", tokenizer)
    seen = []
    for start, tokens in stream_tokens(source, "train"):
        assert start % LENGTH == 0 and tokens[0] >= 1 << 30
        for place in np.flatnonzero(tokens & (1 << 30)).tolist():
            ids = read_document(source, "train", start + place, 1000).tolist()
            seen.append(ids if len(ids) + place == LENGTH else [*ids, 2])
    assert sorted(ids if ids in [e for e, _ in expected] else ids[:-1] for ids in seen) == [ids for ids, _ in expected]
    assert found.splits[0].longest_document in (LENGTH, LENGTH - 1)


def test_a_run_on_them_says_what_it_reads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"messages": talk("a", "b")}])
    prepare_chat([file], tokenizer.path, tmp_path / "rows", ALL)
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "rows")),), tokenizer=str(tokenizer.path), sequence_length=LENGTH,
        global_batch_size=1,
    )  # fmt: skip
    assert [part.kind for part in describe_mixture(data, 1)] == ["chat"]


def test_what_is_stopped_leaves_nothing_that_the_next_start_keeps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "def read(path): return json.loads(open(path).read()) " * 40
    file = write_lines(tmp_path / "data.jsonl", [{"messages": talk(f"{i}?", text)} for i in range(3000)])
    command = [sys.executable, TOOL, file, "--tokenizer", tokenizer.path, "--out", tmp_path / "rows"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    unfinished = tmp_path / ".rows.conversations.incomplete"
    while not unfinished.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "nothing was written; run the same command again" in said
    assert not (tmp_path / "rows").exists()
    write_lines(file, [{"messages": talk("a", "b")}])
    assert prepare_chat([file], tokenizer.path, tmp_path / "rows", ALL).samples == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "rows"]


def test_the_program(conversations: list[Messages], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"messages": messages} for messages in conversations])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    common = (tmp_path / "data.jsonl", "--out", tmp_path / "rows", "--max-length", LENGTH)
    done = run(*common, "--tokenizer", tokenizer.path, "--validation-fraction", 0.1)
    assert done.returncode == 0, done.stderr
    table = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.stdout.splitlines() if "│" in line}
    manifest = load_manifest(tmp_path / "rows")
    assert int(table["rows"]) == manifest.train.rows + manifest.validation.rows
    assert int(table["held out"]) == manifest.validation.documents and table["samples"] == "60"
    assert "OpenAI messages" in done.stdout and str(tmp_path / "rows" / "questions.jsonl") in done.stdout
    assert "oldest round(s) are left out" in done.stderr
    again = run(*common, "--tokenizer", tokenizer.path)
    assert (again.returncode, again.stdout) == (1, "") and "error: out_dir = " in again.stderr
    missing = run(*common, "--tokenizer", tmp_path / "model" / "no.model", "--overwrite")
    assert missing.returncode == 1 and "no.model' is not a file: a SentencePiece model is needed." in missing.stderr
