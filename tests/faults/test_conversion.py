"""The same conversion several times at once: requeued, started by all hosts of a pod, killed and restarted."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from bc2_jax.convert.conversion import to_hf, to_orbax
from tests.convert.models import TINY, array_bytes, random_folder
from tests.faults.harness import wait_until
from tests.faults.preloaded import Program

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"

# tools/convert.py, which at its third read reports it and waits for permission to continue.
HELD = """
import itertools, pathlib, runpy, sys, time
from bc2_jax.convert import stream
signs, tool, *args = map(str, sys.argv[1:])
count, read = itertools.count(1), stream.Stream.read
def held(self, path, layer):
    if next(count) == 3:
        pathlib.Path(signs, "reached").touch()
        while not pathlib.Path(signs, "go").exists():
            time.sleep(0.01)
    return read(self, path, layer)
stream.Stream.read = held
sys.argv = [tool, *args]
runpy.run_path(tool, run_name="__main__")
"""


@dataclasses.dataclass
class Conversion:
    """A running tools/convert.py."""

    process: Program
    log: Path
    """What it writes."""
    signs: Path | None = None

    def wait_until_reached(self) -> None:
        wait_until(lambda: (self.signs / "reached").exists() or self.process.poll() is not None, "the third read")
        assert self.process.poll() is None, self.log.read_text()

    def go_on(self) -> tuple[int, str]:
        if self.signs is not None:
            (self.signs / "go").touch()
        return self.end()

    def end(self) -> tuple[int, str]:
        """Exit code, and what it wrote."""
        wait_until(lambda: self.process.poll() is not None, "the end")
        return self.process.returncode, self.log.read_text()


def start(folder: Path, *args: object, hold: str | None = None) -> Conversion:
    """With its log in `folder`; held, if a name of its signs is given."""
    words, signs = [str(TOOL), *map(str, args)], None
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    log.touch()
    if hold is not None:
        signs, program = folder / hold, folder / "held.py"
        signs.mkdir()
        program.write_text(HELD)
        words = [str(program), str(signs), *words]
    return Conversion(Program(words, dict(os.environ), log), log, signs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return random_folder(tmp_path_factory.mktemp("source") / "a", TINY)


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_requeued_conversion(source, tmp_path, command):
    """While one runs, a second is refused and changes nothing. After a kill the next one cleans up and completes."""
    target, convert = tmp_path / "out" / "b", to_orbax if command == "to-orbax" else to_hf
    convert(source, tmp_path / "expected")
    first = start(tmp_path, command, source, target, hold="first")
    first.wait_until_reached()
    staged = names(target.parent)
    code, text = start(tmp_path, command, source, target, "--overwrite").end()
    assert code == 1 and len(text.strip().splitlines()) == 1, text
    assert f"The target {target} is in use by process {first.process.pid}" in text
    assert names(target.parent) == staged
    assert first.go_on()[0] == 0
    assert names(target.parent) == ["b"]
    assert array_bytes(target) == array_bytes(tmp_path / "expected")

    killed = start(tmp_path, command, source, target, "--overwrite", hold="killed")
    killed.wait_until_reached()
    killed.process.send_signal(signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    assert array_bytes(target) == array_bytes(tmp_path / "expected")
    assert len(names(target.parent)) > 1
    assert start(tmp_path, command, source, target, "--overwrite").end()[0] == 0
    assert names(target.parent) == ["b"]
    assert array_bytes(target) == array_bytes(tmp_path / "expected")


def test_all_hosts_start_at_once(source, tmp_path):
    target = tmp_path / "out" / "b"
    conversions = [start(tmp_path, "to-orbax", source, target) for _ in range(3)]
    ends = [conversion.end() for conversion in conversions]
    assert [code for code, _ in ends].count(0) == 1, ends
    for code, text in ends:
        assert code == 0 or "is in use by process" in text or f"{target} exists; pass --overwrite" in text
    to_orbax(source, tmp_path / "expected")
    assert array_bytes(target) == array_bytes(tmp_path / "expected")
    assert names(target.parent) == ["b"]


def test_a_target_that_appears_meanwhile_is_kept(source, tmp_path):
    target = tmp_path / "out" / "b"
    first = start(tmp_path, "to-hf", source, target, hold="first")
    first.wait_until_reached()
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    code, text = first.go_on()
    assert code == 1 and f"error: {target} exists; pass --overwrite to replace it." in text.splitlines()
    assert names(target.parent) == ["b"] and names(target) == ["notes.txt"]
