"""Writes the raw material of `bc2 demo --all`: texts, conversations, preference pairs, prompts and benchmark files.

python -m bc2_jax.demo.texts raw

raw/text/{zh,en,code}.jsonl    documents to curate (data/demo_corpus.py)
raw/chat/{dialogues,tasks}.jsonl    conversations to fine-tune on (align/demo.py)
raw/pairs.jsonl, raw/pairs_held_out.jsonl    preference pairs (align/demo_preferences.py)
raw/prompts.jsonl    prompts for reinforcement learning, with what their answers are checked by
raw/questions.jsonl    held-out questions: no other file has them
raw/benchmarks/{mmlu,cmmlu}    multiple-choice questions made of them, in the files of MMLU and CMMLU
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.demo import Conversation, make_tasks, read_dialogues
from bc2_jax.align.demo_preferences import language_of, make_pairs
from bc2_jax.data.demo_corpus import demo_documents
from bc2_jax.data.pinned_package import publishing

TASKS, HELD_OUT, PREFERENCES, HELD_OUT_PAIRS = 6000, 900, 3000, 200
SHOTS = 5
_LANGUAGES = ("Chinese", "English", "Python", "French"), ("中文", "英文", "Python", "法文")


def write_texts(folder: Path, cache: Path | None = None) -> None:
    """Writes all files to `folder`, which appears complete or not at all. `cache` has the downloads."""
    documents = demo_documents(cache)
    held_out = make_tasks(documents, HELD_OUT, seed=2)
    asked = {question_of(task) for task in held_out}
    tasks, others = (
        [task for task in make_tasks(documents, count, seed) if question_of(task) not in asked]
        for count, seed in ((TASKS, 0), (PREFERENCES, 1))
    )
    pairs = make_pairs(others)
    prompts = [
        {"prompt": question_of(task), "answer": task[1]["content"], "language": language_of(question_of(task))}
        for task in others
    ]
    with publishing(folder) as out:
        for name, texts in documents.items():
            rows = ({"id": f"{name}-{i}", "text": text, "source": name} for i, text in enumerate(texts))
            write_lines(out / "text" / f"{name}.jsonl", rows)
        if dialogues := read_dialogues(cache):
            write_lines(out / "chat" / "dialogues.jsonl", map(as_record, dialogues))
        write_lines(out / "chat" / "tasks.jsonl", map(as_record, tasks))
        write_lines(out / "pairs.jsonl", pairs[HELD_OUT_PAIRS:])
        write_lines(out / "pairs_held_out.jsonl", pairs[:HELD_OUT_PAIRS])
        write_lines(out / "prompts.jsonl", prompts)
        write_lines(out / "questions.jsonl", map(as_record, held_out))
        write_benchmarks(out / "benchmarks", held_out)


def question_of(conversation: Conversation) -> str:
    return conversation[0]["content"]


def as_record(conversation: Conversation) -> dict[str, Conversation]:
    return {"messages": conversation}


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def write_benchmarks(folder: Path, tasks: Sequence[Conversation]) -> None:
    """Writes questions with four options: English ones in the files of MMLU, Chinese ones in those of CMMLU.

    The questions are those of `tasks` whose answer is a number or the language of a text.
    """
    rng = random.Random(0)
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for question, answer in tasks:
        language, right = language_of(question["content"]), answer["content"]
        is_number = right.isdecimal()
        wrong = near_numbers(int(right), rng) if is_number else other_languages(right, language)
        if wrong:
            options = [right, *wrong]
            rng.shuffle(options)
            subject = "numbers" if is_number else "languages"
            row = [" ".join(question["content"].split()), *options, "ABCD"[options.index(right)]]
            rows.setdefault((language, subject), []).append(row)
    # CMMLU's subjects have fixed names.
    zh_names = {"numbers": "elementary_mathematics", "languages": "elementary_chinese"}
    for (language, subject), found in rows.items():
        for split, part in (("dev", found[:SHOTS]), ("test", found[SHOTS:])):
            if language == "en":
                path = folder / "mmlu" / split / f"{subject}_{split}.csv"
                write_csv(path, part)
            else:
                path = folder / "cmmlu" / split / f"{zh_names[subject]}.csv"
                header = ["", "Question", "A", "B", "C", "D", "Answer"]
                write_csv(path, [header, *([str(i), *row] for i, row in enumerate(part))])


def near_numbers(right: int, rng: random.Random) -> list[str]:
    """Three different numbers near the right one."""
    near = [number for number in range(max(0, right - 5), right + 6) if number != right]
    return [str(number) for number in rng.sample(near, 3)]


def other_languages(right: str, language: str) -> list[str]:
    """Three other languages than the right one, in the language of the question; none if `right` is not one."""
    names = _LANGUAGES[language == "zh"]
    return [name for name in names if name != right] if right in names else []


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
