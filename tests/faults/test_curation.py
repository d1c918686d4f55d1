"""Curation that is killed, runs out of disk, is started twice or interrupted loses nothing and reports it correctly."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.inputs import ReadConfig
from bc2_jax.curate.pipeline import curate
from bc2_jax.curate.storage import Folder
from tests.curate.test_pipeline import document

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
DOCUMENTS = 48
# Dies at a change of the files in OUT: the n-th after the stage `write` has begun.
WORKER = """
import json, os, signal, sys
from bc2_jax.curate import storage
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.inputs import ReadConfig
from bc2_jax.curate.pipeline import curate

raw, out, jsonl, kill_at = sys.argv[1:]
changes = begun = 0

def change(real):
    def changed(self, *arguments):
        global changes
        changes += 1 if begun else 0
        if changes > int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)
    return changed

for kind, names in ((storage.Folder, ("remove", "delete", "write")), (storage._Replacement, ("__enter__", "__exit__"))):
    for name in names:
        setattr(kind, name, change(getattr(kind, name)))

def show(stage, *_):
    global begun
    begun = stage == "write"

config = CurationConfig(read=ReadConfig(unit_bytes=3000, shard_bytes=3000), jsonl=jsonl == "yes")
curate([raw], out, config, Engine("native"), show)
"""


def config(jsonl: bool = True) -> CurationConfig:
    return CurationConfig(read=ReadConfig(unit_bytes=3000, shard_bytes=3000), jsonl=jsonl)


def lines(count: int) -> list[str]:
    return [json.dumps({"id": f"d{i}", "text": f"{document(i)} Number {i}."}) + "\n" for i in range(count)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("raw") / "a.jsonl"
    rows = [{"id": f"d{i}", "text": f"{document(i)} Number {i}."} for i in range(DOCUMENTS)] + [
        {"id": "short", "text": "No."}
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    curate([str(raw)], str(out), config(), Engine("native"), lambda *_: None)
    return content(out)


def content(out: Path) -> dict[str, str]:
    files = [path for name in ("documents", "removed", "jsonl") for path in sorted((out / name).rglob("*.*"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def count(out: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in (out / "documents").glob("*.parquet"))


def again(raw: Path, out: Path, jsonl: bool = True) -> dict:
    report = curate([str(raw)], str(out), config(jsonl), Engine("native"), lambda *_: None)
    assert report["written"]["documents"] == count(out) == DOCUMENTS
    assert json.loads((out / "report.json").read_text())["written"] == report["written"]
    return report


def test_killed_in_write(raw: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """A finished run with other settings is written again; each start is killed a little later than the one before."""
    out = tmp_path / "out"
    again(raw, out, jsonl=False)
    assert len(list((out / "documents").iterdir())) > 8
    for kill_at in (0, 2, 7, 20):
        arguments = [str(raw), str(out), "yes", str(kill_at)]
        done = subprocess.run([sys.executable, "-c", WORKER, *arguments], env=ENVIRONMENT, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        if (out / "report.json").exists():
            assert count(out) == DOCUMENTS
    again(raw, out)
    assert content(out) == whole


def test_a_full_disk_in_write(
    raw: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = Folder.write_table, tmp_path / "out"
    for room in (0, 3, 4):
        written = 0

        def write_table(self, name, table, compression="lz4", *, room=room, **options):
            nonlocal written
            if self.location.startswith(str(out)) and "work" not in self.location.removeprefix(str(out)):
                written += 1
                if written > room:
                    raise OSError(28, "No space left on device")
            return real(self, name, table, compression, **options)

        monkeypatch.setattr(Folder, "write_table", write_table)
        with pytest.raises(OSError, match="No space left on device"):
            curate([str(raw)], str(out), config(), Engine("native"), lambda *_: None)
        assert not (out / "report.json").exists()
    monkeypatch.setattr(Folder, "write_table", real)
    again(raw, out)
    assert content(out) == whole


def test_what_someone_deleted_is_written_again(raw: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    again(raw, out)
    for folder in ("documents", "removed", "jsonl"):
        (min((out / folder).iterdir())).unlink()
        again(raw, out)
        assert content(out) == whole
    (out / "documents" / "000009-0009.parquet").write_bytes(next((out / "documents").iterdir()).read_bytes())
    with pytest.raises(OSError, match=r"documents has \d+ documents where 48 were written: something else wrote"):
        again(raw, out)


def start(raw: Path, out: Path) -> subprocess.Popen:
    """The program, which makes many small units of its input."""
    command = [sys.executable, str(ROOT / "tools" / "curate.py"), str(raw), "--out", str(out)]
    command += ["--read.unit-bytes", "300"]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for a stage of seconds."""
    file = tmp_path_factory.mktemp("large") / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": f"{document(i)} Number {i}."}) + "\n" for i in range(2000))
    )
    return file


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted: "), (signal.SIGTERM, 143, "terminated: ")]
)
def test_a_signal_is_one_sentence_and_a_second_start_is_refused(
    large: Path, tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    process = start(large, tmp_path / "out")
    while not (tmp_path / "out" / "work" / "read" / "results").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    second = rf"--out = '{tmp_path / 'out'}' is in use by process {process.pid} on "
    with pytest.raises(OSError, match=second):
        curate([str(large)], str(tmp_path / "out"), CurationConfig(), Engine("native"), lambda *_: None)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert f"{said}what is finished is kept; run the same command to resume." in stderr
    assert "Traceback" not in stderr and "error" not in stderr
