"""Many clients of all kinds at one server for minutes: no wrong token, leaked slot, memory growth or compilation.

python benchmarks/soak_server.py [MODEL] [--clients 64] [--minutes 5] [--slots 16] [--queue 24]

MODEL is a folder or checkpoint with its tokenizer; without it a small random one is made. `tools/serve.py` runs in
its own process. Before the load, `generate` answers --requests random ones in this process (ragged prompts, some with
a common prefix, all kinds of settings), each alone. Under load each client picks one of them and reads the answer as
JSON, as a stream, as a slow stream, disconnects at some token, or sends a malformed body. There are more clients than
rows and queue places, so some are refused (429) and retry after Retry-After.

Every answer must have the ids of `generate`; no status may be 5xx; at the end nothing may run or wait, no slot may be
in use, no program may have been compiled, and the server's memory must be within --growth percent of its start. The
exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file

from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared, prepare
from bc2_jax.infer.settings import Settings
from bc2_jax.tokenizer import Tokenizer
from benchmarks.serve import free_port, make_model, running, serve_command

MOST_NEW = 48
BROKEN: tuple[dict[str, Any] | str, ...] = (
    "{", "[]", {"prompt": []}, {"prompt": [-1]}, {"prompt": "a", "max_tokens": 10**9}, {"prompt": "a", "temprature": 1},
    {"prompt": "a", "n": 10**4}, {"prompt": "\ud800", "logit_bias": {"x": 1}}, {"prompt": {"a": 1}}, "\0" * 100,
)  # fmt: skip
NEUTRAL = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and the ids that answer it."""

    body: dict[str, Any]
    expected: list[int]


def draw_cases(prepared: Prepared, tokenizer: Tokenizer, count: int, rng: random.Random) -> list[Case]:
    """Requests of ragged lengths with what `generate` gives each of them alone."""
    top, longest = tokenizer.vocab_size, prepared.max_length - MOST_NEW
    commons = [[rng.randrange(300, top) for _ in range(longest)] for _ in range(3)]
    cases = []
    for i in range(count):
        shared = commons[i % 3][: rng.choice((0, 64, 100, 200))]
        room = longest - len(shared)
        prompt = shared + [rng.randrange(300, top) for _ in range(min(room, 1 + int(rng.expovariate(1 / 60))))]
        settings: dict[str, Any] = rng.choice((
            {"temperature": 0.0},
            {"temperature": 1.0, "top_k": rng.choice((3, 40)), "top_p": 0.9},
            {"temperature": 1.5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
            {"temperature": 0.7, "frequency_penalty": 1.0, "min_tokens": 2},
        ))  # fmt: skip
        settings = {"seed": rng.randrange(2**32), **settings}
        body = {"prompt": prompt, "max_tokens": rng.randint(1, MOST_NEW), "return_token_ids": True, **settings}
        about = Settings(max_new_tokens=body["max_tokens"], vocab_size=top, **NEUTRAL | settings)
        [answer] = continue_prompts(prepared, [prompt], about)
        cases.append(Case(body, answer.tokens))
    return cases


class Soak:
    """The clients and what they saw."""

    def __init__(self, url: str, cases: list[Case], end: float, seed: int):
        self.cases, self.end, self.seed = cases, end, seed
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.tokens = 0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self.client = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)

    async def run_client(self, number: int) -> None:
        """One client until the end."""
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < self.end:
            kind = rng.choices(("json", "stream", "slow", "leaves", "broken"), (30, 30, 10, 25, 5))[0]
            try:
                await getattr(self, f"_{kind}")(rng)
            except httpx.HTTPError as error:
                self._fault(f"{kind}: {error!r}")

    def _fault(self, text: str) -> None:
        self.seen["faults"] += 1
        self.wrong.append(text)

    async def _check_status(self, reply: httpx.Response, kind: str) -> bool:
        """Whether it is a good answer; waits as long as a full queue says."""
        if reply.status_code == 429:
            self.seen["429"] += 1
            await asyncio.sleep(float(reply.headers["retry-after"]) * 0.2)
        elif reply.status_code != 200:
            self._fault(f"{kind}: status {reply.status_code}, {(await reply.aread())[:300]!r}")
        return reply.status_code == 200

    def _compare(self, kind: str, case: Case, found: list[int]) -> None:
        self.tokens += len(found)
        self.seen[kind] += 1
        if found != case.expected:
            self._fault(f"{kind}: {case.body} gave {found} and not {case.expected}")

    async def _json(self, rng: random.Random) -> None:
        case = rng.choice(self.cases)
        reply = await self.client.post("/v1/completions", json=case.body)
        if await self._check_status(reply, "json"):
            self._compare("json", case, reply.json()["choices"][0]["token_ids"])

    async def _stream(self, rng: random.Random, kind: str = "stream") -> None:
        case = rng.choice(self.cases)
        found: list[int] = []
        leave = rng.randint(0, max(0, len(case.expected) - 2)) if kind == "leaves" else None
        async with self.client.stream("POST", "/v1/completions", json={**case.body, "stream": True}) as reply:
            if not await self._check_status(reply, kind):
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return self._fault(f"{kind}: {line}")
                    for choice in chunk["choices"]:
                        found += choice.get("token_ids") or []
                if leave is not None and len(found) >= leave:
                    self.seen[kind] += 1
                    return
                if kind == "slow":
                    await asyncio.sleep(rng.uniform(0, 0.2))
        self._compare(kind, case, found)

    async def _slow(self, rng: random.Random) -> None:
        await self._stream(rng, "slow")

    async def _leaves(self, rng: random.Random) -> None:
        await self._stream(rng, "leaves")

    async def _broken(self, rng: random.Random) -> None:
        body = rng.choice(BROKEN)
        text = body if isinstance(body, str) else json.dumps(body)
        reply = await self.client.post("/v1/completions", content=text, headers={"Content-Type": "application/json"})
        self.seen["broken"] += 1
        if not 400 <= reply.status_code < 500:
            self._fault(f"broken body {text[:100]!r}: status {reply.status_code}")


def read_metric(text: str, name: str) -> float:
    """A counter or gauge of /metrics."""
    found = re.search(rf"^{name} (\S+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"there is no {name} in the metrics.")
    return float(found[1])


async def run_all(soak: Soak, clients: int, process: psutil.Process) -> list[int]:
    """All clients until the end; the server's resident bytes every second."""
    tasks = [asyncio.create_task(soak.run_client(number)) for number in range(clients)]
    sizes = []
    while not all(task.done() for task in tasks):
        sizes.append(process.memory_info().rss)
        await asyncio.sleep(1)
    await asyncio.gather(*tasks)
    return sizes


async def find_leaks(soak: Soak) -> None:
    """Adds to the faults what is left in the server after the last client."""
    for _ in range(50):
        text = (await soak.client.get("/metrics")).text
        names = ("bc2_requests_running", "bc2_requests_waiting", "bc2_cache_slots_used")
        left = {name: read_metric(text, name) for name in names}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    else:
        soak._fault(f"left in the server: {left}")
    compiled = read_metric(text, "bc2_compilations_after_start_total")
    if compiled:
        soak._fault(f"{compiled:.0f} programs were compiled after the start")
    print(re.sub(r"(?m)^#.*\n", "", "".join(re.findall(r"(?m)^bc2_(?:requests_total|prefix|rejected).*\n", text))))


async def soak_server(url: str, cases: list[Case], process: psutil.Process, args: argparse.Namespace) -> int:
    """Puts the load on the server and prints what came of it; the exit code."""
    soak = Soak(url, cases, time.monotonic() + 60 * args.minutes, args.seed)
    start = time.monotonic()
    sizes = await run_all(soak, args.clients, process)
    seconds = time.monotonic() - start
    await find_leaks(soak)
    await soak.client.aclose()
    # The first fifth fills what is kept: connections, prefixes, the allocator's own pools.
    fifth = max(1, len(sizes) // 5)
    early, late = (max(part) / 2**20 for part in (sizes[fifth : 2 * fifth] or sizes, sizes[-fifth:]))
    if late > early * (1 + args.growth / 100):
        soak._fault(f"the server's memory grew from {early:.0f} to {late:.0f} MiB")
    print(f"{args.clients} clients, {seconds:.0f} s: {dict(sorted(soak.seen.items()))}")
    print(
        f"{soak.tokens / seconds:.0f} tokens/s in compared answers; memory {early:.0f} MiB early, {late:.0f} MiB late"
    )
    for text in soak.wrong[:10]:
        print(f"WRONG {text}")
    return 1 if soak.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--queue", type=int, default=24)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--growth", type=float, default=3, help="percent of memory (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose_cpu_without_tpu()
    with tempfile.TemporaryDirectory() as directory:
        folder = args.model or Path(directory) / "model"
        if args.model is None:
            make_model(folder, layers=4)
        prepared = prepare(load_pretrained(folder, dtype="float32"))
        cases = draw_cases(prepared, Tokenizer(find_tokenizer(folder)), args.requests, random.Random(args.seed))
        port = free_port()
        command = serve_command(folder, port, "--slots", str(args.slots), "--queue", str(args.queue))
        url = f"http://127.0.0.1:{port}"
        with running(command, f"{url}/health", Path(directory) / "log") as process:
            code = asyncio.run(soak_server(url, cases, psutil.Process(process.pid), args))
            process.terminate()
            if process.wait(60):
                print(f"WRONG the server ended with exit code {process.returncode}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
