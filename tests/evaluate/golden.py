"""The golden numbers of tests/golden/evals (lm-eval's HF backend in fp32), and their requests as texts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from bc2_jax.config import ComputeConfig
from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer

EVALS = Path(__file__).parents[1] / "golden" / "evals"
GOLDEN: dict[str, Any] = json.loads((EVALS / "golden.json").read_text(encoding="utf-8"))
COMPUTE = ComputeConfig(attention="reference", remat="none")
HEADERS = {
    "zh": "以下是单项选择题，请选出其中的正确答案。\n\n",
    "en": "The following are multiple choice questions (with answers).\n\n",
}
ENDS = {"zh": "答案：", "en": "Answer:"}


@functools.cache
def model(mesh=None, dtype="float32") -> Baichuan2:
    return load_pretrained(EVALS / "model", dtype=dtype, mesh=mesh, compute=COMPUTE)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(EVALS / "tokenizer" / "tokenizer.model")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EVALS / "data" / name).read_text(encoding="utf-8").splitlines()]


def pairs(task: str) -> list[tuple[str, str]]:
    """(context, continuation) of each request of a task, as its yaml says."""
    requests = GOLDEN["requests"][task]
    if task == "g_cloze":
        contexts = [item["context"] for item in lines("cloze.jsonl")]
    else:
        language = task.split("_")[1]
        items, shots = lines(f"{language}_test.jsonl"), lines(f"{language}_dev.jsonl")
        if task.endswith("option"):
            template = {"zh": "问题：{}\n回答：", "en": "Question: {}\nAnswer:"}[language]
            contexts = [template.format(item["question"]) for item in items]
        else:
            space = " " if task in ("g_zh_letter_space", "g_en_letter", "g_en_letter_5shot") else ""
            count = 5 if task.endswith("5shot") else 2
            asked = [show(item, language) for item in items]
            header = HEADERS[language]
            header += "".join(f"{show(shot, language)}{space}{shot['answer']}\n\n" for shot in shots[:count])
            contexts = [header + question for question in asked]
    return [(contexts[request["doc"]], request["continuation"]) for request in requests]


def show(item: dict[str, Any], language: str) -> str:
    options = "".join(f"{letter}. {item[letter]}\n" for letter in "ABCD")
    return f"{item['question']}\n{options}{ENDS[language]}"
