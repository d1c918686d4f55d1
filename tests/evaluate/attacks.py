"""Programs that would pass, or harm, if the sandbox of bc2_jax.evaluate did not hold."""

from __future__ import annotations

import secrets
import textwrap
from pathlib import Path
from typing import NamedTuple

MARK = secrets.token_hex(8)
"""In the command line and the files of what would outlive a run."""


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
    for number in range(1024):
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
        except Exception as error:  # whatever refuses this source, the next one is tried
            print(type(error).__name__, error)
def holder(planted):
    search()
holder("".join(["ab"] * 32))
print("found:", sorted(found))
sys.stdout.flush()
for token in [*found, "", "\\n"]:
    for number in range(3, 1024):
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
        os.closerange(0, 1024)
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
