"""tools/supervise.sh with commands that end in every way a training run can end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SUPERVISE = str(ROOT / "tools/supervise.sh")

# Ends with the n-th of its codes at the n-th start; "-9" kills itself with that signal.
SCRIPT = """
echo start >> "$0.starts"
codes=("$@")
code=${codes[$(($(wc -l < "$0.starts") - 1))]}
if ((code < 0)); then kill "$code" $$; fi
exit "$code"
"""


def supervise(folder: Path, codes: list[int], *options: str) -> tuple[int, int, str]:
    """Exit code, number of starts and output of a supervised command that ends with these codes, one after another."""
    script = folder / "command.sh"
    script.write_text(SCRIPT)
    command = [SUPERVISE, "--backoff", "0", *options, "--", "bash", str(script), *map(str, codes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    starts = Path(f"{script}.starts")
    count = len(starts.read_text().splitlines()) if starts.exists() else 0
    starts.unlink(missing_ok=True)
    return result.returncode, count, result.stdout + result.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127])
def test_codes_that_end(tmp_path: Path, code: int) -> None:
    assert supervise(tmp_path, [code, 0])[:2] == (code, 1)


@pytest.mark.parametrize(
    "code, reason",
    [(75, "preempted, exit code 75"), (3, "exit code 3"), (134, "killed by signal 6"), (-9, "killed by signal 9")]
    + [(-11, "killed by signal 11"), (-15, "killed by signal 15")],
)
def test_codes_that_start_again(tmp_path: Path, code: int, reason: str) -> None:
    ended, starts, output = supervise(tmp_path, [code, code, 0])
    assert (ended, starts) == (0, 3)
    assert output.count(f"supervise: {reason}; start again in 0 s") == 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 75, 99, -9]), min_size=1, max_size=4), st.integers(0, 3))
def test_first_code_that_ends_or_the_limit(
    tmp_path_factory: pytest.TempPathFactory, codes: list[int], limit: int
) -> None:
    codes += [0]
    final = next(i for i, code in enumerate(codes) if code in (0, 1, 2))
    last = min(final, limit)
    expected = codes[last] if codes[last] >= 0 else 128 - codes[last]
    folder = tmp_path_factory.mktemp("run")
    assert supervise(folder, codes, "--max-restarts", str(limit))[:2] == (expected, last + 1)


def test_limit_counts_restarts_in_a_row(tmp_path: Path) -> None:
    # With --steady 0 every run is long enough to begin a new row.
    assert supervise(tmp_path, [75] * 5 + [0], "--max-restarts", "1", "--steady", "0")[:2] == (0, 6)
    assert supervise(tmp_path, [75] * 5 + [0], "--max-restarts", "1")[:2] == (75, 2)


def test_waits_twice_as_long_each_time_but_at_most_five_minutes(tmp_path: Path) -> None:
    sleep = tmp_path / "bin/sleep"
    sleep.parent.mkdir()
    sleep.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/slept\n")
    sleep.chmod(0o755)
    environment = {**os.environ, "PATH": f"{sleep.parent}:{os.environ['PATH']}"}
    command = [SUPERVISE, "--max-restarts", "7", "--", "bash", "-c", "exit 75"]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 75
    assert (tmp_path / "slept").read_text().split() == ["10", "20", "40", "80", "160", "300", "300"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    # Like a run: finishes its step, saves and ends with 75.
    run = f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
    command = [SUPERVISE, "--folder", str(tmp_path), "--", "bash", "-c", run]
    process = subprocess.Popen(command)
    wait_for(tmp_path / "up")
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "exit_code").read_text() == "75 stopped\n"
    assert "stopped, exit code 75" in (tmp_path / "train.log").read_text()


def test_signal_while_it_waits(tmp_path: Path) -> None:
    run = f"touch {tmp_path}/up; exit 75"
    process = subprocess.Popen([SUPERVISE, "--backoff", "300", "--folder", str(tmp_path), "--", "bash", "-c", run])
    wait_for(tmp_path / "up")
    deadline = time.monotonic() + 30
    while "start again in 300 s" not in (tmp_path / "train.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=30) == 75


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("earlier\n")
    (tmp_path / "exit_code").write_text("1\n")
    (tmp_path / "run").mkdir()
    code, starts, output = supervise(tmp_path / "run", [75, 0], "--folder", str(tmp_path))
    assert (code, starts, output) == (0, 2, "")
    assert (tmp_path / "exit_code").read_text() == "0\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines == ["earlier", "supervise: preempted, exit code 75; start again in 0 s (1 of 20)"]


def test_one_supervisor_a_folder(tmp_path: Path) -> None:
    run = f"touch {tmp_path}/up; while [ ! -e {tmp_path}/end ]; do sleep 0.02; done"
    first = subprocess.Popen([SUPERVISE, "--folder", str(tmp_path), "--", "bash", "-c", run])
    wait_for(tmp_path / "up")
    second = subprocess.run([SUPERVISE, "--folder", str(tmp_path), "--", "true"], capture_output=True, text=True)
    assert second.returncode == 2 and "in use by another supervisor" in second.stderr
    assert not (tmp_path / "exit_code").exists()
    (tmp_path / "end").touch()
    assert first.wait(timeout=30) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command"),
        (["--"], "no command"),
        (["--max-restarts", "-1", "--", "true"], "--max-restarts = '-1' is not valid: it must be a whole number"),
        (["--backoff", "x$(touch pwned)", "--", "true"], "is not valid: it must be a whole number"),
        (["--folder", "/nowhere", "--", "true"], "--folder = '/nowhere' is not valid: it must be a folder that exists"),
        (["python", "train.py"], "'python' is not valid: it must be --max-restarts"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run([SUPERVISE, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
