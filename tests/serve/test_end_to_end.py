"""A model on disk behind the whole server: served tokens are those of `generate`, scores are those of the library."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from bc2_jax.align.conversation import answer
from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.evaluate import Scorer
from bc2_jax.evaluate.encoding import Request as Scored
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import prepare
from bc2_jax.infer.settings import Settings
from bc2_jax.serve.loading import ServeOptions, describe_model, make_service
from bc2_jax.tokenizer import Tokenizer
from tests.serve.conftest import Running, running

ROOT = Path(__file__).parents[2]
EVALS = ROOT / "tests" / "golden" / "evals"
TEXT = "却说孔明回到寨中，与众将商议。def read(path):\n    return open(path)\n"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model with its tokenizer."""
    path = tmp_path_factory.mktemp("served") / "golden"
    shutil.copytree(EVALS / "model", path)
    shutil.copy(EVALS / "tokenizer" / "tokenizer.model", path)
    return path


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Running]:
    options = ServeOptions(folder, slots=4, dtype="float32")
    model = describe_model(options)
    service = make_service(options, model.length)
    service.start()
    assert set(service.seconds) == {"allocate", "copy_slots", "extend", "score_chunk", "decode"}
    with running(model, service) as found:
        yield found
    service.stop()


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare(load_pretrained(folder, dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EVALS / "tokenizer" / "tokenizer.model")


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 2**32 - 7},
    "everything": {
        "temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2, "seed": 5,
        "logit_bias": {"400": 4.0, "2": 3.0}, "min_tokens": 4,
    },
}  # fmt: skip


def test_served_tokens_are_those_of_generate(server, prepared, tokenizer):
    """Bit for bit, three choices of each, with more requests at once than the server has rows."""
    neutral = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    prompts = {name: tokenizer.encode(TEXT)[:count] for name, count in zip(SETTINGS, (40, 3, 17), strict=True)}

    def ask(name: str) -> list[list[int]]:
        body = {"prompt": prompts[name], "max_tokens": 12, "n": 3, "return_token_ids": True, **SETTINGS[name]}
        return [choice["token_ids"] for choice in server.post("/v1/completions", body).json()["choices"]]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, [*SETTINGS, *SETTINGS]))
    assert found[:3] == found[3:]
    for name, tokens in zip(SETTINGS, found[:3], strict=True):
        given = {**neutral, **SETTINGS[name]}
        if "logit_bias" in given:
            given["logit_bias"] = {int(i): bias for i, bias in given["logit_bias"].items()}
        settings = Settings(max_new_tokens=12, vocab_size=tokenizer.vocab_size, **given)
        expected = continue_prompts(prepared, [prompts[name]] * 3, settings)
        assert tokens == [list(continuation.tokens) for continuation in expected], name
        assert len(set(map(tuple, tokens))) == (1 if name == "greedy" else 3)


def test_served_answers_are_those_of_chat(server, prepared, tokenizer):
    """With the model's own settings, and a history that is longer than the model."""
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "好了。"}] * 5
    messages.append({"role": "user", "content": "How are you?"})
    defaults = server.client.get("/settings").json()["chat"]
    limit = defaults.pop("max_tokens")
    expected = answer(prepared, tokenizer, messages, seed=11, max_new_tokens=limit, **defaults)
    reply = server.post(CHAT, {"messages": messages, "seed": 11}).json()
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["dropped_rounds"] == expected.dropped_rounds > 0
    body = {"messages": messages, "seed": 11, "stream": True}
    lines = server.post(CHAT, body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text


def test_scores_are_those_of_the_library(server, folder, tokenizer):
    """As lm-eval adds them up, over more than one chunk."""
    scorer = Scorer(load_pretrained(folder, dtype="float32"), tokenizer)
    ids = tokenizer.encode(TEXT * 9)[:200]
    cases = [([1], ids[:5]), (ids[:3], ids[3:4]), (ids[:63], ids[63:66]), (ids[:64], ids[64:90]), (ids[:90], ids[90:])]
    expected = scorer.score([Scored(context, continuation) for context, continuation in cases])
    for _ in range(2):  # again with what the first time left in the cache
        for (context, continuation), score in zip(cases, expected, strict=True):
            body = {
                "prompt": [context + continuation], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
                "echo": True,
            }  # fmt: skip
            found = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
            assert found["token_logprobs"][0] is None and len(found["tokens"]) == len(context + continuation) + 1
            log_probs = found["token_logprobs"][len(context) : -1]
            assert math.isclose(sum(log_probs), score.log_prob, rel_tol=1e-5, abs_tol=1e-4)
            tops = found["top_logprobs"][len(context) : -1]
            assert all(a == max(top.values()) for a, top in zip(log_probs, tops, strict=True)) == score.is_greedy


def test_the_greedy_token_is_the_most_likely(server, tokenizer):
    ids = tokenizer.encode(TEXT)[:20]
    body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "logprobs": 5, "return_token_ids": True, "echo": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    log_probs = choice["logprobs"]
    new = log_probs["token_logprobs"][len(ids) :]
    assert new == [max(top.values()) for top in log_probs["top_logprobs"][len(ids) :]]
    # The same tokens as a prompt have the same numbers, up to rounding.
    again = {**body, "prompt": ids + choice["token_ids"], "max_tokens": 0}
    scored = server.post("/v1/completions", again).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scored) == len(ids) + 8
    np.testing.assert_allclose(scored[len(ids) :], new, atol=1e-4)


def test_nothing_was_compiled_and_nothing_is_left(server):
    """After all that the tests above asked for."""
    deadline = time.monotonic() + 5
    while server.service.stats().running and time.monotonic() < deadline:
        time.sleep(0.05)
    stats = server.service.stats()
    assert (stats.running, stats.waiting, stats.slots_used, stats.compilations) == (0, 0, 0, 0)
    assert "bc2_compilations_after_start_total 0.0" in server.client.get("/metrics").text
    assert stats.cached_tokens > 0


def test_the_program(folder, tmp_path):
    """From the command line to an answer, and to exit code 0 at SIGTERM; no key or prompt in what it prints."""
    key = "sk-0123456789abcdef"
    (tmp_path / "keys").write_text(f"ann {key}\n")
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), str(folder), "--port", "0", "--slots", "2"]
    command += ["--dtype", "float32", "--api-key-file", str(tmp_path / "keys"), "--name", "small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        printed, url = "", None
        for line in process.stdout:
            printed += line
            if match := re.search(r"ready: (http://\S+)/", line):
                url = match[1]
                break
        assert url is not None, printed
        assert re.search(r"compiled in [0-9.]+ s: allocate [0-9.]+ s", printed)
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            assert client.get("/health").json() == {"status": "ready"}
            body = {"model": "small", "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}
            assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] >= 1
            assert client.get("/").status_code == 200
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "key=ann" in rest and key not in printed + rest and "secret" not in printed + rest
    finally:
        process.kill()
