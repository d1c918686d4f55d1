"""Pairs as samples of rows: each answer has the tokens and targets of prompt and answer alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align.chat import encode_conversation
from bc2_jax.align.formats import Sample, read_record
from bc2_jax.align.pair_rows import EQUAL, Pair, as_pair, encode_pairs
from bc2_jax.data.batch import row_to_example
from bc2_jax.data.records import Invalid
from bc2_jax.tokenizer import Tokenizer

TEXT = st.text(st.sampled_from("ab c\n汉<reserved_106>"), min_size=1, max_size=9).map(lambda text: text + ".")
TURNS = st.lists(TEXT, max_size=4)


def messages(first: str, texts: list[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """A system text or none; rounds, the last a question, or none at all; answers that may go on."""
    rounds = draw(st.integers(0, 3))
    prompt = messages("user", [draw(TEXT) for _ in range(2 * rounds - 1)])
    if draw(st.booleans()):
        prompt = [{"role": "system", "content": draw(TEXT)}, *prompt]
    answers = [messages("assistant", [draw(TEXT) for _ in range(draw(st.sampled_from([1, 1, 3])))]) for _ in range(2)]
    return Pair(prompt, *answers)


def alone(tokenizer: Tokenizer, prompt: list, answer: list) -> tuple[list[int], list[int]]:
    """Ids and targets, without those of the prompt's answers."""
    ids, targets = encode_conversation(tokenizer, [*prompt, *answer])
    size = sum(1 + len(tokenizer.encode(m["content"])) - (m["role"] == "system") for m in prompt)
    return ids, [-100] * size + targets[size:]


def read_pair(tokens: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of prompt and answer, for both answers of one sample, by way of the fields of a batch."""
    example = {name: x.tolist() for name, x in row_to_example(np.append(tokens, [0, 0]).astype(np.uint32)).items()}
    found = []
    for branch in (1, 2):
        places = [i for i, segment in enumerate(example["segment_ids"]) if segment in (1, 1 + (branch << 24))]
        assert [example["positions"][i] for i in places] == list(range(len(places)))
        found.append(tuple([example[name][i] for i in places] for name in ("input_ids", "labels")))
    return found


@given(st.lists(pairs(), max_size=3))
@settings(max_examples=20)
def test_an_answer_is_that_of_its_prompt_alone(tokenizer: Tokenizer, batch: list[Pair]) -> None:
    found = encode_pairs(tokenizer, batch, 1000, 1000)
    stops = np.cumsum(found.lengths)
    assert not found.cut_tokens.any() and not found.dropped_rounds.any()
    for i, pair in enumerate(batch):
        if pair.chosen == pair.rejected:
            assert (found.lengths[i], found.reasons[i]) == (0, EQUAL)
            continue
        both = [alone(tokenizer, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        assert read_pair(found.tokens[stops[i] - found.lengths[i] : stops[i]]) == both
        shared = found.lengths[i] - sum(len(ids) for ids, _ in both)
        assert -shared == len(alone(tokenizer, pair.prompt, pair.chosen)[0]) - len(
            encode_conversation(tokenizer, pair.chosen)[0]
        )


@given(pairs(), st.integers(1, 60), st.integers(1, 60), st.sampled_from(["rounds", "right", "drop"]))
@settings(max_examples=60)
def test_what_is_too_long_loses_rounds_and_then_ends(
    tokenizer: Tokenizer, pair: Pair, max_length: int, row_length: int, truncation: str
) -> None:
    """Brute force over the rounds to drop: as few as will do; then as few tokens as will do."""

    def sizes(prompt: list) -> tuple[int, list[int]]:
        lengths = [len(alone(tokenizer, prompt, answer)[0]) for answer in (pair.chosen, pair.rejected)]
        trunk = lengths[0] - len(encode_conversation(tokenizer, pair.chosen)[0])
        return trunk, [length - trunk for length in lengths]

    def fits(prompt: list) -> bool:
        trunk, answers = sizes(prompt)
        return trunk + max(answers) <= max_length and trunk + sum(answers) <= row_length

    system = [message for message in pair.prompt if message["role"] == "system"]
    rest = pair.prompt[len(system) :]
    rounds = (len(rest) + 1) // 2
    drops = range(max(rounds, 1)) if truncation == "rounds" else range(1)
    drop = next((n for n in drops if fits(system + rest[2 * n :])), drops[-1])
    trunk, answers = sizes(system + rest[2 * drop :])
    most = max(
        (
            (min(a, b), a + b)
            for a in range(min(answers[0], max(max_length - trunk, 0)) + 1)
            for b in range(min(answers[1], max(max_length - trunk, 0)) + 1)
            if trunk + a + b <= row_length
        ),
        default=(0, 0),
    )
    found = encode_pairs(tokenizer, [pair], max_length, row_length, truncation)
    assert found.dropped_rounds[0] == drop
    cut = int(found.cut_tokens[0])
    # Where both are cut to the same, a last odd token is not given to either.
    assert cut in (sum(answers) - most[1], sum(answers) - 2 * most[0])
    if found.lengths[0]:
        both = [alone(tokenizer, system + rest[2 * drop :], answer)[0] for answer in (pair.chosen, pair.rejected)]
        kept = read_pair(found.tokens)
        assert [ids for ids, _ in kept] == [ids[: len(here)] for ids, (here, _) in zip(both, kept, strict=True)]
        assert all(any(target != -100 for target in targets) for _, targets in kept)
        assert max(len(ids) for ids, _ in kept) <= max_length and found.lengths[0] <= row_length
        assert kept[0] != kept[1] and not (cut and truncation == "drop")
    else:
        assert found.reasons[0] and not len(found.tokens)


RECORD = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "class": "a/b"}


@pytest.mark.parametrize(
    ("further", "margin"),
    [({}, None), ({"margin": 0.5}, 0.5), ({"margin": -1}, -1.0), ({"score_chosen": 5, "score_rejected": 3.5}, 1.5),
     ({"margin": 2, "score_chosen": 5, "score_rejected": 4}, 2.0), ({"margin": None, "score_chosen": None}, None)],
    ids=str,
)  # fmt: skip
def test_a_pair_has_the_margin_that_its_record_says(further: dict[str, Any], margin: float | None) -> None:
    [found] = map(as_pair, read_record({**RECORD, **further}, "data:3"))
    assert isinstance(found, Sample) and found.margin == margin
    assert found.fields == {"class": "a/b", **{name: value for name, value in further.items() if value is not None}}


@pytest.mark.parametrize(
    ("record", "problem"),
    [({**RECORD, "margin": math.nan}, "margin is not a finite number (nan)"),
     ({**RECORD, "margin": "1"}, "margin is not a finite number ('1')"),
     ({**RECORD, "margin": True}, "margin is not a finite number (True)"),
     ({**RECORD, "score_chosen": 1e39, "score_rejected": 1}, "score_chosen is not a finite number (1e+39)"),
     ({**RECORD, "score_rejected": 1}, "only one of score_chosen and score_rejected (both or neither are needed)"),
     ({"prompt": "a", "completion": "b"}, "not a preference pair (chosen and rejected are needed)"),
     ({**RECORD, "rejected": "So."}, "chosen and rejected are equal")],
)  # fmt: skip
def test_what_is_no_pair_is_named(record: dict[str, Any], problem: str) -> None:
    [found] = map(as_pair, read_record(record, "data:3"))
    assert isinstance(found, Invalid) and str(found) == f"data:3: {problem}"
