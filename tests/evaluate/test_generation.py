"""Texts end before the first stop text, wherever tokens end, and so do their rows."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate import generation
from bc2_jax.infer.refill import RefillStats
from tests.evaluate import golden
from tests.evaluate.test_scorer import scorer

NUMBERS = [number for number, item in enumerate(golden.lines("gen.jsonl")) if item["max_gen_toks"] == 40]
ITEMS = [golden.lines("gen.jsonl")[number] for number in NUMBERS]
TEXTS = [golden.GOLDEN["generations"][number]["text"] for number in NUMBERS]


def test_stop_texts_end_rows_and_are_cut(monkeypatch):
    """None of the golden texts reaches its stops; here each has some that it does, inside of pieces too."""
    whole = generation.continue_many
    used: list[RefillStats] = []

    def count(*arguments, **settings):
        found = whole(*arguments, **settings)
        used.append(found[1])
        return found

    monkeypatch.setattr(generation, "continue_many", count)
    stops = [[text[5:7], text[7:8] + "never", "\ufffe"] for text in TEXTS]
    seen = []
    found = scorer().generate_texts(
        [(item["prompt"], stop, item["max_gen_toks"]) for item, stop in zip(ITEMS, stops, strict=True)],
        progress=lambda done, count: seen.append((done, count)),
    )
    for generated, text, stop in zip(found, TEXTS, stops, strict=True):
        assert generated.text == text[: text.index(stop[0])]
        assert generated.reason == "stopped"
        assert generated.tokens < 24
    assert seen[-1] == (len(ITEMS), len(ITEMS)) and seen == sorted(seen)
    assert sum(stats.decode_steps for stats in used) <= 24  # of 39 without stops


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (("", (), 5), "not empty"),
        (("a", 5), "a prompt, its stop texts and max_new_tokens"),
        (("a", "b", 5), "stops"),
        (("a", [""], 5), "stops"),
        (("a", (), 256), r"1\.\.255"),
    ],
)
def test_prompts_that_are_not_valid_are_named(prompt, told):
    with pytest.raises(ValueError, match=rf"prompts\[1\].*{told}"):
        scorer().generate([("a", (), 5), prompt])
