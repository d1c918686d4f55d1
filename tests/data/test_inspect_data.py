"""The program, from the outside."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.cli import inspect_data
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

ROOT = Path(__file__).parents[2]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"} | environment
    command = [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run`, in this process: without the seconds of its imports."""
    command = [str(word) for word in arguments]
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setenv("COLUMNS", "1000")
        code = inspect_data.main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    pack_texts(modules, tokenizer, folder / "code" / "q0", 64, validation_fraction=0)
    pack_texts(modules[:2], tokenizer, folder / "code" / "q1", 64, validation_fraction=0.999)
    return folder


def test_everything(rows: Path, tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> None:
    benchmark = tmp_path / "items.txt"
    benchmark.write_text(modules[3].splitlines()[0] + modules[3][1000:1300].replace("\n", " ") + "\nzzz qqq\n")
    done = run_here(
        rows, "--tokenizer", tokenizer.path, "--benchmarks", benchmark, "--batches", 3, "--batch-size", 2,
        "--html", tmp_path / "page.html", "--json", tmp_path / "found.json", "--out", tmp_path / "figures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert all(f"batch {batch}, row {row}: " in done.stdout for batch in range(3) for row in range(2))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(split["source"], split["split"], split["documents"]) for split in found["splits"]] == [
        ("code/q0", "train", len(modules)),
        ("code/q0", "validation", 0),
        ("code/q1", "train", 0),
        ("code/q1", "validation", 2),
    ]
    assert len(found["exact"]) == 2 and found["near"] == [] and found["differences"] == []
    assert "training has too: 2 of 2 exactly" in done.stdout
    (hit,) = found["hits"]
    assert (hit["file"], hit["line"]) == (str(benchmark), 1) and hit["training"]["source"] == "code/q0"
    assert f"{benchmark}: 1 of 2 (50.0%); 1 are too short to be found" in done.stdout
    assert (tmp_path / "page.html").read_text().count("<h3>") == 6
    assert (tmp_path / "figures" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_tokenizer_and_with_errors(rows: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = run_here(rows)
    assert done.returncode == 0 and "Batches are not shown: that needs --tokenizer." in done.stdout
    assert "training has too: 2 of 2 exactly" in done.stdout
    done = run_here(rows, "--benchmarks", "items.txt")
    assert done.returncode == 1 and "--benchmarks = ['items.txt'] is not valid: it needs --tokenizer." in done.stderr
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"\x12\x00")
    done = run_here(rows, "--tokenizer", other)
    assert done.returncode == 1 and "is not valid: the rows were made with another" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_are_shown_whole_and_as_they_are(tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> None:
    """At 80 columns, in the C locale: neither markup, nor a formula, nor cut off."""
    names = ["[v1] a$b_$", "数据", "_" + "long" * 15 + "/the end"]
    for name in names:
        pack_texts(modules[:1], tokenizer, tmp_path / "rows" / name, 64, validation_fraction=0)
    files = {"json": tmp_path / "found.json", "out": tmp_path / "figures", "tokenizer": tokenizer.path}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    done = run(tmp_path / "rows", *options, COLUMNS="80", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    first = "".join(cell[1].replace(" ", "") for cell in cells)
    assert all(name.replace(" ", "") in first for name in names)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {split["source"] for split in found["splits"]} == set(names)
