"""The demo's raw material: held-out questions are nowhere else, benchmark files are read by the real tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bc2_jax.data.demo_corpus import python_documents
from bc2_jax.demo import texts
from bc2_jax.evaluate.tasks import find_task


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    novel = ["却说曹操引军到了许都，玄德与孔明商议，关公守住下邳城池。\n" * 30]
    patch.setattr(texts, "demo_documents", lambda cache: {"zh": novel, **python_documents()})
    patch.setattr(texts, "read_dialogues", lambda cache: [])  # as where no package registry answers
    folder = tmp_path_factory.mktemp("demo") / "raw"
    texts.write_texts(folder)
    patch.undo()
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_questions_are_in_no_other_file(raw: Path):
    asked = {record["messages"][0]["content"] for record in read(raw / "questions.jsonl")}
    trained = {record["messages"][0]["content"] for record in read(raw / "chat" / "tasks.jsonl")}
    for name in ("pairs", "pairs_held_out", "prompts"):
        trained |= {record["prompt"] for record in read(raw / f"{name}.jsonl")}
    assert len(asked) == texts.HELD_OUT and len(trained) > 5000 and not asked & trained
    pairs, held_out = ({p["prompt"] for p in read(raw / f"{n}.jsonl")} for n in ("pairs", "pairs_held_out"))
    assert not pairs & held_out and len(held_out) == texts.HELD_OUT_PAIRS
    assert not (raw / "chat" / "dialogues.jsonl").exists()


def test_documents(raw: Path):
    for name in ("zh", "en", "code"):
        records = read(raw / "text" / f"{name}.jsonl")
        assert records and all(record["source"] == name and record["text"] for record in records)


@pytest.mark.parametrize("name", ["mmlu", "cmmlu"])
def test_benchmarks_are_read_by_the_real_task(raw: Path, name: str):
    found = find_task(name).load(raw / "benchmarks").examples
    assert len(found) > 50 and {len(example.shots) for example in found} == {texts.SHOTS}
    answers = {tuple(example.gold) for example in found}
    assert answers == {(0,), (1,), (2,), (3,)}
    sums = 0
    for example in found:
        if match := re.search(r"What is (\d+) \+ (\d+)\?|(\d+) 加 (\d+) 等于几", example.question):
            total = sum(int(number) for number in match.groups() if number)
            letter = "ABCD"[example.gold[0]]
            option = next(line for line in example.question.splitlines() if line.startswith(letter))
            assert option[2:].strip() == str(total)
            sums += 1
    assert sums > 5


def test_options_are_different_and_none_is_right_twice():
    import random

    for right in (0, 1, 300):
        options = texts.near_numbers(right, random.Random(right))
        assert len({*options, str(right)}) == 4 and min(map(int, options)) >= 0
    assert texts.other_languages("中文", "zh") == ["英文", "Python", "法文"]
    assert texts.other_languages("even", "en") == []
