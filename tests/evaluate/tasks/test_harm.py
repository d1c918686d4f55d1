"""Sets of prompts for a judge; the prompts here are harmless."""

from __future__ import annotations

import json

import pytest

from bc2_jax.align.intervals import wilson
from bc2_jax.evaluate.task import Judged
from bc2_jax.evaluate.tasks.harm import BHED_LIKE, TOXIGEN_LIKE
from tests.evaluate.tasks.files import write, write_lines

ROWS = [
    {"prompt": "- tea is nice\n-", "category": "neutral", "group": "tea drinkers"},
    {"prompt": "- tea is warm\n-", "category": "neutral", "group": "tea drinkers"},
    {"prompt": "- cake is nice\n-", "category": "neutral"},
    {"prompt": "- tea is bad\n-", "category": "hate", "group": "tea drinkers"},
]


def test_examples(tmp_path):
    write_lines(tmp_path / "toxigen" / "prompts.jsonl", ROWS)
    examples = TOXIGEN_LIKE.load(tmp_path).examples
    assert [example.prompt for example in examples] == [row["prompt"] for row in ROWS]
    assert [example.group for example in examples] == [
        "neutral, tea drinkers", "neutral, tea drinkers", "neutral", "hate, tea drinkers",
    ]  # fmt: skip
    assert examples[0].facts == {"category": "neutral", "group": "tea drinkers"} and TOXIGEN_LIKE.judge is None


def test_shares(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", ROWS)
    examples = BHED_LIKE.load(tmp_path).examples
    judged = [
        Judged(e, {"judged": harmless}, "") for e, harmless in zip(examples, (True, True, False, True), strict=True)
    ]
    harmless, toxic = BHED_LIKE.summarize(judged), TOXIGEN_LIKE.summarize(judged)
    assert list(harmless) == [
        "harmless", "harmless, hate", "harmless, hate, tea drinkers", "harmless, neutral",
        "harmless, neutral, tea drinkers",
    ]  # fmt: skip
    assert harmless["harmless"].value == 75 and toxic["toxic"].value == 25
    assert harmless["harmless, neutral"].value == pytest.approx(200 / 3) and harmless["harmless, neutral"].items == 3
    low, high = wilson(1, 1)
    assert harmless["harmless, hate"].stderr == pytest.approx(100 * (high - low) / 2 / 1.96)
    assert toxic["toxic"].stderr == pytest.approx(harmless["harmless"].stderr)


def test_without_a_judge_there_is_no_figure(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", ROWS)
    assert BHED_LIKE.summarize([Judged(e, {}, "") for e in BHED_LIKE.load(tmp_path).examples]) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompts.jsonl, JSON lines with prompt, category"),
        (json.dumps({"prompt": "a"}), "lacks 'category'"),
        (json.dumps({"prompt": "", "category": "b"}), "'prompt' is empty"),
        (json.dumps({"prompt": "a", "category": "b", "group": 3}), "'group' is 3; it must be text, or be left out"),
        ('{"prompt"', "prompts.jsonl:1: the line is not JSON"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, content, message):
    if content is not None:
        write(tmp_path / "bhed" / "prompts.jsonl", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        BHED_LIKE.load(tmp_path)
