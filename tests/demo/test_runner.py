"""Stages are run once, resumed when they were stopped, repeated when their settings change, and fail clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bc2_jax.demo.records import Record, read_record, record_path
from bc2_jax.demo.runner import StageFailed, run_stages, words_to_run
from bc2_jax.demo.stage import Result, Stage, stages_for
from bc2_jax.files import InUse, lock

ROOT = Path(__file__).parents[2]


class Shown:
    """Which stages ran, and which were done already."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.done: list[str] = []

    def begin(self, stage: Stage, index: int) -> None:
        pass

    def working(self, log: Path) -> None:
        assert log.is_file()

    def end(self, stage: Stage, record: Record, was_done: bool) -> None:
        (self.done if was_done else self.ran).append(stage.name)


def append(file: str, text: str = "x") -> tuple[str, ...]:
    """A command that adds a line to a file."""
    return ("python", "-c", f"open({file!r}, 'a').write({text!r} + '\\n')")


def make(name: str, *commands: tuple[str, ...], needs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Stage:
    outputs = outputs or (name,)
    return Stage(name, name.title(), "", commands or (append(name),), outputs, lambda workdir: Result(), needs)


def run(stages: list[Stage], workdir: Path) -> Shown:
    shown = Shown()
    run_stages(stages, workdir, "bc2 again", shown)
    return shown


def test_stages_run_once_in_order(tmp_path: Path):
    stages = [make("a"), make("b", ("python", "-c", "open('b', 'w').write(open('a').read() * 2)"), needs=("a",))]
    assert run(stages, tmp_path).ran == ["a", "b"]
    assert (tmp_path / "b").read_text() == "x\nx\n"
    again = run(stages, tmp_path)
    assert (again.ran, again.done) == ([], ["a", "b"])
    record = read_record(tmp_path, "a")
    assert record is not None and record.bytes == 2 and record.finished and len(record.commands) == 1
    assert 0 < record.cpu_seconds < 60 and record.seconds > 0


def test_changed_settings_repeat_a_stage_and_those_that_need_it(tmp_path: Path):
    run([make("a"), make("b", needs=("a",)), make("c")], tmp_path)
    shown = run([make("a", append("a", "new")), make("b", needs=("a",)), make("c")], tmp_path)
    assert (shown.ran, shown.done) == (["a", "b"], ["c"])
    # Removed before: not a second line.
    assert (tmp_path / "a").read_text() == "new\n" and (tmp_path / "b").read_text() == "x\n"


def test_a_stage_whose_output_is_gone_is_repeated(tmp_path: Path):
    stages = [make("a"), make("b", needs=("a",))]
    run(stages, tmp_path)
    (tmp_path / "a").unlink()
    assert run(stages, tmp_path).ran == ["a", "b"]


def test_a_failure_names_stage_command_log_and_way_on_and_is_resumed(tmp_path: Path):
    fail = "print('line one'); print('the cause'); raise SystemExit(3 if not __import__('os').path.exists('ok') else 0)"
    stages = [make("a"), make("b", append("b"), ("python", "-c", fail), append("b"))]
    with pytest.raises(StageFailed) as error:
        run(stages, tmp_path)
    message = str(error.value)
    for part in ("stage 2 of 2, B,", "exit code 3", "the cause", "python -c", "logs/b.log", "bc2 again"):
        assert part in message
    (tmp_path / "ok").touch()
    shown = run(stages, tmp_path)
    assert (shown.ran, shown.done) == (["b"], ["a"])
    # The first command of the stage was finished and is not repeated, nor is its output removed.
    assert (tmp_path / "b").read_text() == "x\nx\n"
    record = read_record(tmp_path, "b")
    assert record is not None and record.interruptions == 1 and len(record.commands) == 3


def test_a_killed_command_is_named_by_its_signal(tmp_path: Path):
    kill = ("python", "-c", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StageFailed, match="SIGKILL"):
        run([make("a", kill)], tmp_path)


def test_a_stage_that_does_not_make_its_output_fails(tmp_path: Path):
    with pytest.raises(StageFailed, match="without missing"):
        run([make("a", outputs=("a", "missing"))], tmp_path)


def test_files_of_others_are_not_touched(tmp_path: Path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="was not made by this program"):
        run([make("a")], tmp_path)
    assert (tmp_path / "a").read_text() == "mine"


def test_one_process_a_workdir(tmp_path: Path):
    with lock(tmp_path / ".lock", "it"), pytest.raises(InUse):
        run([make("a")], tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path):
    path = record_path(tmp_path, "a")
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json is not the record"):
        run([make("a")], tmp_path)


PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests_demo import make, Shown, append
    from bc2_jax.demo.runner import run_stages
    slow = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(0 if os.path.exists('ok') else 60)"
    stages = [make("a"), make("b", append("b"), ("python", "-c", slow), append("b"))]
    run_stages(stages, Path({workdir!r}), "again", Shown())
    """
)


def start_slow(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """(a program whose second stage waits for ever, the process that waits)."""
    (tmp_path / "tests_demo.py").write_text(Path(__file__).read_text())
    workdir = tmp_path / "work"
    code = PROGRAM.format(root=str(tmp_path), workdir=str(workdir))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    pid = workdir / "pid"
    for _ in range(600):
        if pid.is_file() and pid.read_text():
            return program, int(pid.read_text())
        time.sleep(0.05)
    raise AssertionError("the second stage has not begun")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc; a killed parent takes its program along on Linux only"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_at_any_moment_it_resumes(tmp_path: Path, number: int):
    program, pid = start_slow(tmp_path)
    program.send_signal(number)
    program.wait(30)
    for _ in range(200):
        if not is_alive(pid):
            break
        time.sleep(0.05)
    assert not is_alive(pid)
    workdir = tmp_path / "work"
    assert json.loads(record_path(workdir, "b").read_text())["finished"] == ""
    (workdir / "ok").touch()
    slow = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(0 if os.path.exists('ok') else 60)"
    shown = run([make("a"), make("b", append("b"), ("python", "-c", slow), append("b"))], workdir)
    assert (shown.ran, shown.done) == (["b"], ["a"])
    assert (workdir / "b").read_text() == "x\nx\n"


def test_words_to_run():
    assert words_to_run(["bc2", "train", "demo"]) == [sys.executable, "-m", "bc2_jax", "train", "demo"]
    assert words_to_run(["python", "-m", "x"]) == [sys.executable, "-m", "x"]


def test_parts_by_name_come_with_what_they_need():
    stages = [make("a"), make("b", needs=("a",)), make("c", needs=("b",)), make("d")]
    assert [stage.name for stage in stages_for(stages, ["c"])] == ["a", "b", "c"]
    assert stages_for(stages, []) == stages
    with pytest.raises(ValueError, match="legal names are a, b, c, d"):
        stages_for(stages, ["x"])
