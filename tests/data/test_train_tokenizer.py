"""The program, from the outside."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bc2_jax.cli import train_tokenizer
from bc2_jax.data import tokenizer_report
from bc2_jax.data.packing import split_of
from bc2_jax.data.tokenizer_report import Check
from bc2_jax.tokenizer import Tokenizer
from tests.data.few_code_points import take_few

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, object]]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    program = [str(ROOT / "tests" / "data" / "few_code_points.py"), str(ROOT / "tools" / "train_tokenizer.py")]
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run`, in this process: without the seconds of its imports."""
    command = [str(word) for word in arguments]
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setenv("COLUMNS", "1000")
        take_few(patch.setattr)
        code = train_tokenizer.main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())


def write(file: Path, rows: Rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.fixture(scope="module")
def rows(modules: list[str]) -> Rows:
    """Some functions as code, some made-up prose, and a language nobody asks for."""
    code = [part for text in modules for part in text.split("\n\n\n") if len(part) > 200]
    zh = [f"第{i}回说的是天下大势分久必合合久必分。" * 3 for i in range(60)]
    other = {"source": "web", "cluster": 0, "score": 0.5, "weight": 1.0}
    return [
        {"id": f"{language}{i}", "text": text, "language": language, **other}
        for language, texts in (("code", code), ("zh", zh), ("fr", ["bonjour " * 20]))
        for i, text in enumerate(texts)
    ]


def test_a_curated_folder(rows: Rows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a" / "documents" / "000000-0000.parquet", rows[::2])
    write(tmp_path / "a" / "documents" / "000001-0000.parquet", [*rows[1::2], {**rows[0], "text": None}])
    write(tmp_path / "a" / "work" / "read" / "shards" / "000000-0000.parquet", rows)
    (tmp_path / "a" / "report.json").write_text(json.dumps({"written": {"documents": len(rows) + 1}}))
    arguments = (
        "--vocab-size",
        640,
        "--validation-fraction",
        0.1,
        "--sample-bytes",
        20_000,
        "--shares",
        "zh=.3,code=.7",
    )
    done = run(tmp_path / "a", *arguments, "--out", tmp_path / "out" / "a.model", "--compare", tokenizer.path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.model", "a.report.json"]
    trained = Tokenizer(tmp_path / "out" / "a.model")
    assert trained.vocab_size == 640
    report = json.loads((tmp_path / "out" / "a.report.json").read_text())
    assert report["sha256"] == trained.fingerprint and report["invalid_documents"] == 1
    assert "000001-0000.parquet:" in done.stderr and "is null, not a string" in done.stderr
    languages = report["languages"]
    assert {language: count["documents"] for language, count in languages.items()} == {
        language: sum(row["language"] == language for row in rows) for language in ("code", "fr", "zh")
    }
    assert languages["fr"]["drawn_documents"] == 0 and languages["code"]["drawn_bytes"] == 14_000
    assert report["training_text"]["texts"] == sum(count["drawn_documents"] for count in languages.values())
    assert [check["passed"] for check in report["checks"]] == [True] * 8 and done.stdout.count("passed  ") == 8
    held_out = {"code": [], "zh": [], "fr": []}
    for row in rows:
        if split_of(row["text"], 0.1) == "validation":
            held_out[row["language"]].append(row["text"])
    results = report["compression"]["results"]
    for name, model in ((str(tmp_path / "out" / "a.model"), trained), (str(tokenizer.path), tokenizer)):
        for language in ("code", "zh"):
            (result,) = (r for r in results if (r["tokenizer"], r["language"]) == (name, language))
            texts = held_out[language]
            assert result["documents"] == len(texts) > 0
            assert result["tokens"] == sum(map(len, model.encode_batch(texts)))
            assert result["tokens_per_byte"] == result["tokens"] / len("".join(texts).encode())
            assert f"{result['tokens_per_character']:.4f}" in done.stdout

    # The same documents in other files and another order give the same model.
    write(tmp_path / "b.parquet", rows[::-1])
    again = run_here(tmp_path / "b.parquet", *arguments, "--out", tmp_path / "b.model")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "b.model").read_bytes() == (tmp_path / "out" / "a.model").read_bytes()


def test_text_files_and_tables_in_one_folder(rows: Rows, modules: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write(corpus / "deep" / "a.parquet", [{"content": row["text"]} for row in rows[:40]])
    lines = [json.dumps({"content": row["text"]}) for row in rows[40:60]]
    (corpus / "b.jsonl").write_text("\n".join([*lines, "{broken"]))
    (corpus / "c.txt").write_text(modules[0])
    out = tmp_path / "t.model"
    done = run(corpus, "--vocab-size", 640, "--out", out, "--text-field", "content", "--validation-fraction", 1e-9)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "t.report.json").read_text())
    assert report["languages"]["unknown"]["drawn_documents"] == 61 and report["invalid_documents"] == 1
    assert report["compression"]["results"] == [] and "no document is held out" in done.stderr
    again = run_here(corpus, "--vocab-size", 640, "--out", out)
    assert again.returncode == 1 and "it exists; choose another or --overwrite" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "gone.model"], "--compare = 'gone.model' is not valid: it must be a SentencePiece model"),
        (["--shares", "zh=.5,en=.1"], "shares = {'zh': 0.5, 'en': 0.1} is not valid: they must be positive with sum 1"),
        (["--vocab-size", "100"], "vocab_size = 100 is not valid: it must be more than the 455 fixed pieces"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    file = write(tmp_path / "in" / "a.parquet", rows)
    out = tmp_path / "out" / "t.model"
    assert train_tokenizer.main([str(file), "--vocab-size", "500", "--out", str(out), *arguments]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.rglob("*.model*"))


def test_a_failed_check_is_an_error(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_report, "check_tokenizer", lambda *_: [Check("good", None), Check("bad", "why")])
    file = write(tmp_path / "a.parquet", rows)
    out = tmp_path / "t.model"
    assert train_tokenizer.main([str(file), "--vocab-size", "640", "--out", str(out)]) == 1
    assert not out.exists() and (tmp_path / "t.model.failed").is_file()
    report = json.loads((tmp_path / "t.report.json").read_text())
    assert report["checks"][1] == {"name": "bad", "passed": False, "failure": "why"}
