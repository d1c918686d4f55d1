"""Starts the server of a model, asks it questions over HTTP, and stops it.

python -m bc2_jax.demo.ask_server MODEL QUESTIONS.jsonl ANSWERS.json

The first questions of the file (conversations, the last message of each the expected answer) are asked greedily, the
first one once more as a stream. ANSWERS.json has for each of them question, expected, answer and seconds.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bc2_jax.demo.runner import end_with_parent, words_to_run
from bc2_jax.files import replaced

QUESTIONS = 4
MAX_TOKENS = 24
_TIMEOUT = 120.0


def ask(url: str, question: str) -> str:
    """The answer of the server at `url`, such as http://127.0.0.1:8000/."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS}
    with _post(f"{url}v1/chat/completions", body) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def stream(url: str, question: str) -> str:
    """The same answer, put together from the events of a stream."""
    body = {
        "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True,
    }  # fmt: skip
    parts = []
    with _post(f"{url}v1/chat/completions", body) as reply:
        for line in reply:
            event = line.decode("utf-8").strip().removeprefix("data:").strip()
            if event and event != "[DONE]":
                parts += [choice["delta"].get("content") or "" for choice in json.loads(event)["choices"]]
    return "".join(parts)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=_TIMEOUT)


def main(model: str, questions: Path, out: Path) -> None:
    command = words_to_run(["bc2", "serve", model, "--port", "0", "--slots", "2"])
    start = time.monotonic()
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        preexec_fn=end_with_parent,
    )
    try:
        url = wait_for(server)
        ready = time.monotonic() - start
        with questions.open(encoding="utf-8") as lines:
            asked = [json.loads(line)["messages"] for line in itertools.islice(lines, QUESTIONS)]
        answers = []
        for *messages, expected in asked:
            begin, question = time.monotonic(), messages[-1]["content"]
            answer = ask(url, question)
            seconds = round(time.monotonic() - begin, 3)
            answers.append(
                {"question": question, "expected": expected["content"], "answer": answer, "seconds": seconds}
            )
            print(f"{question!r} -> {answer!r} in {seconds} s", flush=True)
        is_same = stream(url, answers[0]["question"]) == answers[0]["answer"]
    finally:
        server.terminate()
        server.wait()
    record = {"model": model, "seconds_until_ready": round(ready, 2), "stream_is_the_same": is_same, "answers": answers}
    with replaced(out) as partial:
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def wait_for(server: subprocess.Popen[str]) -> str:
    """The URL that the server prints when it is ready. Raises RuntimeError if it ends before."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready: "):
            return line.removeprefix("ready: ").strip()
    raise RuntimeError(f"the server ended with exit code {server.wait()} before it was ready.")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
