import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Wide, so that no message is wrapped; the package is importable from the repository as after installing it.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    command = [sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def stream(path: Path) -> list[int]:
    rows = read_rows(path, "train")
    return [int(rows[0, 0]), *(int(i) for row in rows for i in row[1:] if i)]


def test_all_kinds_of_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    lines = [
        "\ufeff" + json.dumps({"text": "first", "id": 1}),
        json.dumps({"text": "第二"}, ensure_ascii=False),
        "{not json",
        "",
        json.dumps({"title": "no text"}),
        json.dumps({"text": 7}),
        json.dumps({"text": "a\ud800"}),
        json.dumps({"text": ""}),
        json.dumps(["text"]),
    ]
    (corpus / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n' + b'{"text": "last"}')
    (corpus / "deep" / "b.txt").write_bytes(b"one\r\ndocument\n")
    (corpus / "deep" / "c.txt").write_bytes(b"\xff\xfe")
    (corpus / "deep" / "ignored.md").write_text("not read")
    done = run(
        corpus, "--tokenizer", tokenizer.path, "--sequence-length", 8, "--out", tmp_path / "rows",
        "--validation-fraction", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    documents = ["first", "第二", "last", "one\r\ndocument\n"]
    assert stream(tmp_path / "rows") == [i for text in documents for i in [*tokenizer.encode(text), 2]]
    manifest = load_manifest(tmp_path / "rows")
    assert (manifest.documents, manifest.empty_documents, manifest.invalid_documents) == (12, 1, 7)
    assert "12 documents read, 1 empty, 7 invalid; written to" in done.stdout
    assert f"{manifest.train.tokens}" in done.stdout
    for where, reason in {
        "a.jsonl:3": "it is not JSON",
        "a.jsonl:5": "it is no object with a field 'text'",
        "a.jsonl:6": "in field 'text', it is no string but int",
        "a.jsonl:7": "in field 'text', it has a lone surrogate at character 1",
        "a.jsonl:9": "it is no object with a field 'text'",
        "a.jsonl:10": "it is not UTF-8 (invalid start byte at byte 10)",
        "c.txt": "it is not UTF-8 (invalid start byte at byte 0)",
    }.items():
        assert f"{where}: {reason}" in done.stderr


def test_another_field_and_existing_output(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "some words", "text": 1}\n')
    arguments = (
        file, "--tokenizer", tokenizer.path, "--out", tmp_path / "rows", "--sequence-length", 4,
        "--text-field", "content", "--validation-fraction", 0,
    )  # fmt: skip
    assert run(*arguments).returncode == 0
    assert stream(tmp_path / "rows") == [*tokenizer.encode("some words"), 2]
    again = run(*arguments)
    assert again.returncode == 1 and "it exists; choose another or pass overwrite" in again.stderr
    assert run(*arguments, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("name", "message"), [("gone.jsonl", "does not exist"), ("data.csv", "must be .jsonl, .txt or a folder")]
)
def test_bad_inputs_are_one_line(tokenizer: Tokenizer, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    done = run(tmp_path / name, "--tokenizer", tokenizer.path, "--out", tmp_path / "rows")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "rows").exists()
