"""Preference pairs, prompts and reward functions for the demo, made of the tasks of `align.demo`.

Preferred are right answers, answers in the language of the question, and answers without repetition: rules that a
reward model of a few million parameters learns in minutes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.demo import DemoRows, make_tasks
from bc2_jax.align.formats import write_records
from bc2_jax.data.demo_corpus import demo_documents
from bc2_jax.data.pinned_package import default_cache, publishing
from bc2_jax.files import fingerprint

_FORMAT = 1
_TASKS, _TASK_SEED = 6000, 1
"""Other tasks than for supervised fine-tuning."""
_PAIRS, _HELD_OUT_PAIRS = 3000, 300
GAPS = {"repeats itself": 1, "other language": 3, "wrong": 5}
"""Fault of the rejected answer -> how much better the chosen one is, the gap of the reward report."""

_OPPOSITE = {"even": "odd", "单数": "双数", "yes": "no", "提到了": "没有"}
_OPPOSITE |= {wrong: right for right, wrong in _OPPOSITE.items()}
_TRANSLATION = {
    "even": "双数", "odd": "单数", "yes": "提到了", "no": "没有", "Chinese": "中文", "English": "英文",
}  # fmt: skip
_TRANSLATION |= {chinese: english for english, chinese in _TRANSLATION.items()}
_LANGUAGES = {"en": ("Chinese", "English", "Python"), "zh": ("中文", "英文", "Python")}


@dataclasses.dataclass(frozen=True)
class DemoPreferences:
    """Files made by `prepare_preferences`, JSON Lines."""

    pairs: Path
    """Pairs to train on: prompt, chosen, rejected, class, gap."""
    held_out: Path
    """Held-out pairs, of other tasks."""
    prompts: Path
    """Prompts with fields for reward functions: answer, language."""
    questions: Path
    """The held-out questions of the chat demo."""


def prepare_preferences(chat: DemoRows, cache: str | os.PathLike[str] | None = None) -> DemoPreferences:
    """Makes the files in a folder of `cache` named after a hash of their contents, without the held-out questions of
    the chat demo; an existing folder is reused."""
    cache = Path(cache) if cache is not None else default_cache()
    with chat.questions.open(encoding="utf-8") as lines:
        asked = {_question(json.loads(line)) for line in lines}
    tasks = make_tasks(demo_documents(cache), _TASKS, _TASK_SEED)
    tasks = [task for task in tasks if task[0]["content"] not in asked]
    pairs = make_pairs(tasks)
    prompts = [
        {"prompt": question["content"], "answer": answer["content"], "language": language_of(question["content"])}
        for question, answer in tasks
    ]
    files = {"pairs": pairs[_HELD_OUT_PAIRS:][:_PAIRS], "held_out": pairs[:_HELD_OUT_PAIRS], "prompts": prompts}
    key = fingerprint([files, _FORMAT], sort_keys=False)[:16]
    folder = cache / f"demo-preferences-{key}"
    pairs_file, held_out, prompts_file = (folder / f"{name}.jsonl" for name in files)
    made = DemoPreferences(pairs_file, held_out, prompts_file, chat.questions)
    if folder.is_dir():
        return made
    with publishing(folder) as temporary:
        for name, records in files.items():
            write_records(temporary / f"{name}.jsonl", records)
    return made


def make_pairs(tasks: Sequence[Sequence[Mapping[str, str]]], seed: int = 0) -> list[dict[str, Any]]:
    """A pair for each task (a question and its right answer); deterministic."""
    rng = random.Random(seed)
    pairs = []
    for question, answer in tasks:
        text, right = question["content"], answer["content"]
        # None where a question has no worse answer of that kind.
        worse = {
            "wrong": wrong_answer(text, right, rng),
            "other language": _TRANSLATION.get(right),
            "repeats itself": " ".join([right] * rng.randrange(3, 7)),
        }
        names = rng.sample(list(worse), k=len(worse))
        if rng.random() < 0.5:  # the hardest, so most pairs
            names.insert(0, "wrong")
        name = next(name for name in names if worse[name] is not None)
        pairs.append({"prompt": text, "chosen": right, "rejected": worse[name], "class": name, "gap": GAPS[name]})
    return pairs


def wrong_answer(question: str, right: str, rng: random.Random) -> str:
    """An answer of the same kind as the right one."""
    if right.isdecimal():
        return str(max(0, int(right) + rng.choice([-3, -2, -1, 1, 2, 3])) if right != "0" else rng.randrange(1, 4))
    if right in _OPPOSITE:
        return _OPPOSITE[right]
    return rng.choice([other for other in _LANGUAGES[language_of(question)] if other != right])


def language_of(text: str) -> str:
    """ "zh" if the first letter is Chinese, else "en": a task may quote a text in another language after its
    question."""
    letters = (character for character in text if character.isalpha())
    return "zh" if "\u4e00" <= next(letters, "a") <= "\u9fff" else "en"


def nearness(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Reward function: 1 for the record's answer; less for other numbers, down to 0 for twice the right one."""
    return [_nearness(answer.strip(), row["answer"]) for answer, row in zip(answers, rows, strict=True)]


def _nearness(answer: str, right: str) -> float:
    if not (answer.isdecimal() and right.isdecimal()):
        return float(answer == right)
    return max(0.0, 1 - abs(int(answer) - int(right)) / max(int(right), 1))


def fits_language(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Reward function: 1 for an answer in the language of its question or without letters, else 0."""
    return [
        float(not any(map(str.isalpha, answer)) or language_of(answer) == row["language"])
        for answer, row in zip(answers, rows, strict=True)
    ]


def _question(conversation: Mapping[str, Any]) -> str:
    return next(message["content"] for message in conversation["messages"] if message["role"] == "user")
