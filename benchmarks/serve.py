"""Tokens per second of `tools/serve.py` with 1, 8 and 32 clients, beside transformers and llama.cpp.

python benchmarks/serve.py [--clients 1 8 32] [--slots 8] [--tokens 128] [--rounds 3] [--only ours llama.cpp]

Needs `pip install -e '.[serve,torch,gguf]' httpx2 'llama-cpp-python[server]'`, which builds llama.cpp; --only leaves
out what is not installed. The model is a small RoPE model with random weights (32 layers, from which llama.cpp infers
the position embedding) on this machine's CPU, in fp32; llama.cpp's file is f16. Each client requests --tokens greedy
tokens after its own prompt and waits. transformers has no queue and gets all prompts as one batch of
`model.generate`. The server of llama-cpp-python answers one request at a time. The ways alternate and the fastest
round of each counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert.conversion import to_gguf, to_hf
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.table import param_shapes, unflatten
from bc2_jax.terminal import make_console, make_table
from bc2_jax.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
WAYS = ("ours", "transformers", "llama.cpp")
LENGTH, PROMPT = 512, 64
Generate = Callable[[list[list[int]]], int]
"""Continues all prompts and returns how many tokens that made."""


def make_model(folder: Path, layers: int = 32) -> Tokenizer:
    """A random model with a tokenizer of the standard library, as a folder in the PyTorch layout."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))]
    tokenizer = train_tokenizer(texts, folder.parent / "spm.model", 1024)
    config = ModelConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=8,
        position_embedding="rope", vocab_size=tokenizer.vocab_size, model_max_length=LENGTH,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in param_shapes(config).items():
        scale = np.float32(1 if "embed" in path or "lm_head" in path else shape[-1] ** -0.5)
        params[path] = np.ones(shape, np.float32) if "norm" in path else scale * rng.standard_normal(shape, np.float32)
    save_folder(unflatten(params), config, folder, "float32", tokenizer_path=tokenizer.path)
    return tokenizer


@contextlib.contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[subprocess.Popen]:
    """A server from its command line until it answers; ended with SIGTERM."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(ready, timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not become ready:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def free_port() -> int:
    """A port of loopback on which no one listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serve_command(folder: Path, port: int, *options: str) -> list[str]:
    """Our server on a port of loopback, in fp32."""
    program = [sys.executable, str(ROOT / "tools" / "serve.py"), str(folder), "--port", str(port)]
    return [*program, "--dtype", "float32", *options]


def over_http(url: str, fields: dict, write: Callable[[list[int]], list[int] | str] = list) -> Generate:
    """One client a prompt, all at one time; `write` makes of its ids what the request has."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=64))

    def ask(ids: list[int]) -> int:
        reply = client.post(url, json={"prompt": write(ids), "temperature": 0, **fields})
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: {reply.status_code} {reply.text[:500]}")
        return reply.json()["usage"]["completion_tokens"]

    def generate(prompts: list[list[int]]) -> int:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(ask, prompts))

    return generate


def with_transformers(folder: Path, count: int) -> Generate:
    """One call of `generate` for all prompts; they are of one length, so that nothing is padded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(prompts: list[list[int]]) -> int:
        found = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(len(prompts), PROMPT, dtype=torch.long), do_sample=False,
            max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
        )  # fmt: skip
        return found[:, PROMPT:].numel()

    return generate


def host_gap(url: str) -> str:
    """Milliseconds of the host between turns, and of a decoding step, from the server's own metrics."""
    text = httpx.get(f"{url}/metrics").text

    def mean(name: str) -> float:
        values = dict(re.findall(rf"^{name}_(sum|count) (\S+)", text, re.MULTILINE))
        return 1e3 * float(values["sum"]) / max(float(values["count"]), 1)

    gap, step = mean("bc2_host_seconds"), mean("bc2_step_seconds")
    return f"host between turns {gap:.2f} ms, a decoding step {step:.2f} ms (mean)"


def measure(ways: dict[str, Generate], clients: list[int], rounds: int, vocab_size: int) -> dict[tuple, float]:
    """Tokens a second of each way with each number of clients."""
    rng = np.random.default_rng(1)
    best: dict[tuple, float] = {}
    for number in range(1 + rounds):
        for count in clients:
            # Other prompts each time: none is in a cache of prefixes, in any of the servers.
            prompts = rng.integers(300, vocab_size, (count, PROMPT)).tolist()
            for name, generate in ways.items():
                start = time.perf_counter()
                rate = generate(prompts) / (time.perf_counter() - start)
                if number:  # the first round warms up
                    best[name, count] = max(best.get((name, count), 0), rate)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=8, help="of our server; other clients wait (default 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        work, ways = Path(directory), {}
        tokenizer = make_model(work / "model")
        if "ours" in args.only:
            url = f"http://127.0.0.1:{(port := free_port())}"
            command = serve_command(work / "model", port, "--slots", str(args.slots))
            stack.enter_context(running(command, f"{url}/health", work / "ours.log"))
            ways["ours"] = over_http(f"{url}/v1/completions", {"max_tokens": args.tokens, "ignore_eos": True})
        if "transformers" in args.only:
            to_hf(work / "model", work / "llama", layout="llama", dtype="float32")
            ways["transformers"] = with_transformers(work / "llama", args.tokens)
        if "llama.cpp" in args.only:
            to_gguf(work / "model", work / "model.gguf", kind="f16")
            port = free_port()
            command = [sys.executable, "-m", "llama_cpp.server", "--model", str(work / "model.gguf")]
            command += ["--n_ctx", str(LENGTH), "--port", str(port), "--n_threads", str(os.cpu_count())]
            stack.enter_context(running(command, f"http://127.0.0.1:{port}/v1/models", work / "llama.log"))
            fields = {"max_tokens": args.tokens, "logit_bias": {str(tokenizer.eos_id): -100}, "repeat_penalty": 1.0}
            url_of_llama = f"http://127.0.0.1:{port}/v1/completions"
            ways["llama.cpp"] = over_http(url_of_llama, fields, tokenizer.decode)  # takes no ids
        best = measure(ways, args.clients, args.rounds, tokenizer.vocab_size)
        table = make_table("clients", *(f"{name} tokens/s" for name in ways), "ours / best other", numbers_from=0)
        for count in args.clients:
            rates = [best[name, count] for name in ways]
            others = [rate for name, rate in zip(ways, rates, strict=True) if name != "ours"]
            ratio = f"{rates[0] / max(others):.2f}" if others and "ours" in ways else ""
            table.add_row(str(count), *(f"{rate:,.0f}" for rate in rates), ratio)
        make_console().print(table)
        if "ours" in ways:
            print(host_gap(url))


if __name__ == "__main__":
    main()
