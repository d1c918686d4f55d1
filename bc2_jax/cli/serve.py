"""Serves a model over HTTP: OpenAI's chats and completions, and a chat page for the browser.

bc2 serve                       # the demo's chat model; then open http://127.0.0.1:8000/
bc2 serve MODEL --slots 16 --slot-length 2048
bc2 serve MODEL --tensor 8 --quantize int8 --kv int8
bc2 serve MODEL --host 0.0.0.0 --api-key-file keys.txt

MODEL is a folder in the released PyTorch layout, or a bc2_jax checkpoint or run. All programs are compiled first; until
then /health says 503. docs/serving.md has the endpoints and what they accept.

The first SIGTERM or Ctrl-C drains: requests that run are completed, for --drain-seconds at most. A second one ends at
once. The exit code is 1 if the engine failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.evaluate.devices import Devices, add_device_options, devices_of, start_devices
from bc2_jax.terminal import command, local_path, log_to_stderr, run_program

DEMO = Path("runs/demo_chat")
KEY_VARIABLE = "BC2_API_KEY"
AGREED = ("slots", "slot_length", "dtype", "mesh", "kv", "quantize", "long_context", "max_length")
"""Options that must be the same on all processes."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="MODEL", type=local_path, nargs="?", help=f"default {DEMO}, the demo's chat model"
    )
    parser.add_argument("--name", help="of the model in requests (default: that of its folder)")
    parser.add_argument(
        "--adapter", type=local_path, metavar="DIR", help="a LoRA adapter on the model, as PEFT writes it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default 8000)")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="requests answered together (default 8)")
    parser.add_argument(
        "--slot-length", type=int, metavar="S", help="most tokens of prompt and answer (default: the model's length)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tensor", type=int, metavar="N", help="the same as --mesh.tensor: use all devices")
    parser.add_argument("--kv", choices=("int8",), help="keep keys and values in half the memory")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="keep the weights in a half or a quarter of it")
    parser.add_argument(
        "--long-context", choices=("ntk", "yarn"),
        help="allow more tokens than the model was trained on, up to --max-length (yarn: 7B only)",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens with --long-context")
    parser.add_argument(
        "--api-key-file", type=local_path, metavar="F",
        help=f"one key a line, KEY or NAME KEY; the variable {KEY_VARIABLE} holds a single one",
    )  # fmt: skip
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="another name that a Host header may have, such as a proxy's; repeatable",
    )  # fmt: skip
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="most requests that wait (default 64)")
    parser.add_argument("--queue-seconds", type=float, default=60, metavar="T", help="most that one waits (default 60)")
    parser.add_argument(
        "--total-seconds", type=float, default=600, metavar="T", help="most for a request in all (default 600)"
    )
    parser.add_argument("--drain-seconds", type=float, default=30, metavar="T", help="after SIGTERM (default 30)")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log")
    add_device_options(parser)
    return parser


def read_devices(args: argparse.Namespace) -> tuple[Devices, bool]:
    """The devices that the options say, and whether they say any: else one is enough."""
    if args.tensor is not None:
        if getattr(args, "mesh.tensor") not in (None, args.tensor):
            raise ValueError(f"--tensor = {args.tensor} is not valid: --mesh.tensor is {getattr(args, 'mesh.tensor')}.")
        setattr(args, "mesh.tensor", args.tensor)
    named = any(value is not None for name, value in vars(args).items() if name.startswith("mesh."))
    return devices_of(args), named


def read_model(given: Path | None) -> Path:
    """The model's folder; raises ValueError if none was given and the demo's was not made."""
    if given is not None:
        return given
    if not DEMO.is_dir():
        make = command("train.py", "configs/demo_chat.py")
        raise ValueError(f"there is no {DEMO} to serve: make it with {make}, or name a MODEL.")
    return DEMO


def read_all_keys(file: Path | None) -> list[tuple[str, str]]:
    """The keys of the file, and that of the environment."""
    from bc2_jax.serve.security import check_key, read_keys

    keys = [] if file is None else read_keys(file)
    if key := os.environ.get(KEY_VARIABLE):
        check_key(f"the key in {KEY_VARIABLE}", key)
        keys.append(("env", key))
    return keys


class Loader(threading.Thread):
    """Reads the weights and compiles while the server already says that it is loading."""

    def __init__(self, options: Any, length: int, limits: Any, backend: Any, metrics: Any, url: str):
        super().__init__(name="loader", daemon=True)
        self._options, self._length, self._limits, self._url = options, length, limits, url
        self._backend, self._metrics = backend, metrics
        self.error: Exception | None = None

    def run(self) -> None:
        from bc2_jax.serve.loading import make_service

        start = time.monotonic()
        try:
            service = make_service(self._options, self._length, self._metrics.observe, self._limits)
            read = time.monotonic()
            print(f"read the weights in {read - start:.1f} s; compiling", flush=True)
            service.start()
        except Exception as error:  # reported by the main thread, which then ends the program
            self.error, self._backend.has_failed = error, True
            return
        programs = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in service.seconds.items())
        print(f"compiled in {time.monotonic() - read:.1f} s: {programs}", flush=True)
        self._metrics.watch(service.stats)
        self._backend.service = service
        print(f"ready: {self._url}", flush=True)


def run(args: argparse.Namespace) -> None:
    log_to_stderr()
    logging.getLogger("bc2_jax.serve").setLevel(logging.INFO)
    model = read_model(args.model)
    choose_cpu_without_tpu()
    # Imported here so that --help and a typo answer at once.
    try:
        from bc2_jax.serve.api import Api, Backend
        from bc2_jax.serve.server import listen, run_server
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'bc2_jax[serve]'.") from error
    import jax

    from bc2_jax.agreement import require_agreement
    from bc2_jax.serve.loading import ServeOptions, describe_model, follow_service
    from bc2_jax.serve.metrics import Metrics
    from bc2_jax.serve.security import Hosts, Keys, check_address
    from bc2_jax.serve.waiting import QueueLimits

    keys = read_all_keys(args.api_key_file)
    check_address(args.host, bool(keys))
    devices, has_mesh = read_devices(args)
    start_devices(devices)
    options = ServeOptions(
        model, slots=args.slots, slot_length=args.slot_length, dtype=args.dtype,
        mesh=devices.mesh if has_mesh or jax.process_count() > 1 else None,
        kv=args.kv or "compute", quantize=args.quantize, long_context=args.long_context, max_length=args.max_length,
        adapter=args.adapter, name=args.name,
    )  # fmt: skip
    limits = QueueLimits(requests=args.queue, queue_s=args.queue_seconds, total_s=args.total_seconds)
    served = describe_model(options)
    require_agreement({f"--{name}": str(getattr(options, name)) for name in AGREED})
    if jax.process_index() != 0:
        follow_service(options, served.length)
        return
    backend, metrics = Backend(), Metrics()
    api = Api(
        served, backend, keys=Keys(keys), hosts=Hosts(args.host, args.allowed_host), metrics=metrics,
        log_prompts=args.log_prompts,
    )  # fmt: skip
    with listen(args.host, args.port) as listening:
        port = listening.getsockname()[1]
        loader = Loader(options, served.length, limits, backend, metrics, f"http://{args.host}:{port}/")
        print(f"loading {model} as {served.name!r}", flush=True)
        loader.start()
        code = run_server(api.app, backend, listening, drain_s=args.drain_seconds)
    if loader.error is not None:
        raise ValueError(f"the model could not be served: {loader.error}") from loader.error
    if code:
        raise SystemExit(leave(code))


def leave(code: int) -> int:
    """Of several processes, ends this one after an error without waiting for the others."""
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        from bc2_jax.train import distributed

        distributed.leave(code, "start all of them again")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return leave(run_program(run, make_parser(), argv))
