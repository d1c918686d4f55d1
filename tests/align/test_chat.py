"""Conversations as tokens against golden rows of the released tokenizer and rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align.chat import (
    check_messages,
    drop_oldest_rounds,
    encode_conversation,
    encode_prompt,
    fit_conversation,
    fit_prompt,
)
from bc2_jax.tokenizer import ASSISTANT_ID, EOS_ID, USER_ID

GOLDEN = Path(__file__).parents[1] / "golden" / "align"
SFT = json.loads((GOLDEN / "sft_text.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((GOLDEN / "chat_prompts.json").read_text(encoding="utf-8"))


class Recorded:
    """Knows the ids of the texts of golden rows that were not cut; the released tokenizer may not be committed."""

    user_id, assistant_id, eos_id = USER_ID, ASSISTANT_ID, EOS_ID

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        whole = [(r["messages"], r["input_ids"][:-1]) for r in SFT if r["full_length"] == len(r["input_ids"])]
        whole += [(r["messages"], r["input_ids"][:-1]) for r in PROMPTS if r["model_max_length"] == 4096]
        for messages, ids in whole:
            texts = [message["content"] for message in messages]
            parts: list[list[int]] = [[]]
            for token in ids:
                if token in (USER_ID, ASSISTANT_ID):
                    parts.append([])
                else:
                    parts[-1].append(token)
            self.ids |= zip(texts, parts if messages[0]["role"] == "system" else parts[1:], strict=True)

    def encode(self, text: str) -> list[int]:
        return self.ids[text]


class Characters:
    """One id a character, from 1000 on."""

    user_id, assistant_id, eos_id = USER_ID, ASSISTANT_ID, EOS_ID

    def encode(self, text: str) -> list[int]:
        return [1000 + ord(c) for c in text]


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def test_conversations_are_the_golden_rows():
    tokenizer = Recorded()
    assert len(SFT) == 24
    for row in SFT:
        ids, targets = encode_conversation(tokenizer, row["messages"], row["model_max_length"])
        assert (ids, targets) == (row["input_ids"], row["targets"])
        assert len(encode_conversation(tokenizer, row["messages"])[0]) == row["full_length"]


def test_prompts_are_the_golden_ones():
    tokenizer = Recorded()
    assert len(PROMPTS) == 20
    for row in PROMPTS:
        ids = encode_prompt(tokenizer, row["messages"], row["max_new_tokens"], row["model_max_length"])
        assert ids == row["input_ids"]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
CONVERSATIONS = st.builds(
    lambda rounds, system, greeting: talk(*[t for r in rounds for t in r], system=system)
    if not greeting
    else [*talk(system=system), {"role": "assistant", "content": greeting}, *talk(*[t for r in rounds for t in r])],
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.none() | TEXTS, st.none() | TEXTS,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS, st.integers(1, 60))
def test_targets_follow_from_the_ids_alone(messages, max_length):
    """Inside 196 .. (195 or the end) the next token is learned, eos in place of a 195."""
    ids, targets = encode_conversation(Characters(), messages)
    in_answer = False
    for i, token in enumerate(ids):
        in_answer = token == ASSISTANT_ID or (in_answer and token not in (USER_ID, EOS_ID))
        following = None if i + 1 == len(ids) else EOS_ID if ids[i + 1] == USER_ID else ids[i + 1]
        assert targets[i] == (following if in_answer and following is not None else -100)
    cut_ids, cut_targets = encode_conversation(Characters(), messages, max_length)
    assert cut_ids == ids[:max_length]
    assert cut_targets[:-1] == targets[: len(cut_ids) - 1] and cut_targets[-1] == -100


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS, st.integers(1, 60))
def test_the_oldest_rounds_are_dropped_and_no_more_than_needed(messages, max_length):
    tokenizer = Characters()
    kept, dropped = drop_oldest_rounds(tokenizer, messages, max_length)
    system = [m for m in messages if m["role"] == "system"]
    rest = messages[len(system) :]
    starts = [i for i, m in enumerate(rest) if i == 0 or m["role"] == "user"]
    assert kept == system + rest[starts[dropped] :]
    assert dropped == len(starts) - 1 or len(encode_conversation(tokenizer, kept)[0]) <= max_length
    if dropped:
        one_more = system + rest[starts[dropped - 1] :]
        assert len(encode_conversation(tokenizer, one_more)[0]) > max_length
    fitted = fit_conversation(tokenizer, messages, max_length)
    assert (fitted.ids, fitted.targets) == encode_conversation(tokenizer, kept, max_length)
    assert fitted.dropped_rounds == dropped
    assert fitted.cut_tokens == len(encode_conversation(tokenizer, kept)[0]) - len(fitted.ids)


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS, st.integers(1, 60), TEXTS | st.none())
def test_a_prompt_fits_and_ends_where_the_answer_begins(messages, room, question):
    messages = messages + ([{"role": "user", "content": question}] if question else [])
    prompt = fit_prompt(Characters(), messages, 4, room + 4)
    assert len(prompt.ids) <= room
    whole = fit_prompt(Characters(), messages, 0, 10_000)
    assert (whole.dropped_rounds, whole.cut_tokens) == (0, 0)
    assert prompt.ids[-1] == (ASSISTANT_ID if question else whole.ids[-1])
    if prompt.ids != whole.ids:
        assert len(whole.ids) > room or prompt.dropped_rounds
    if not question:
        assert whole.ids == encode_conversation(Characters(), messages)[0][:-1]


def test_a_prompt_says_what_it_lost():
    messages = talk("aaaa", "bbbb", "cc", "dd", "ee", system="ss")
    # ss + 195 cc 196 dd + 195 ee are 11 tokens: the 196 at the end is not counted, and pushes out the first one.
    prompt = fit_prompt(Characters(), messages, 4, 15)
    assert (prompt.dropped_rounds, prompt.cut_tokens, len(prompt.ids)) == (1, 1, 11)
    assert fit_prompt(Characters(), messages, 4, 16)[1:] == (1, 0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: no message."),
        ("hello", "messages = 'hello' is not valid: it must be a list of messages."),
        ([{"content": "hi"}], "messages[0]: no object with role and content ({'content': 'hi'})."),
        (talk(system="be kind"), "messages: a system text alone."),
        ([{"role": "tool", "content": "1"}], "messages[0]: unknown role ('tool'; legal are system, user, assistant)."),
        ([{"role": "user", "content": 5}], "messages[0]: content is not text (5)."),
        ([*talk("a", "b"), *talk(system="s")], "messages[2]: a system text that is not the first message."),
        (talk("a", "b\ud800"), "messages[1]: a lone surrogate in the answer (at character 1)."),
        (talk("", "b"), "messages[0]: the user message is empty."),
        (talk("a", ""), "messages[1]: the answer is empty."),
        ([*talk("a", "b"), *talk("c", "d")[1:]], "messages[2]: two answers in a row (they must take turns)."),
        ([*talk("a"), *talk("c", "d")], "messages[1]: two user messages in a row (they must take turns)."),
        (talk("a", "b", "c"), "messages[2]: no answer to the last user message."),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages, message):
    for refuse in (check_messages, lambda m: encode_conversation(Characters(), m)):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            refuse(messages)


def test_a_prompt_may_be_what_the_released_code_takes():
    """It asks for an answer to whatever there is, but what has no tokens is refused."""
    tokenizer = Characters()
    twice = [*talk("a"), *talk("b")]
    assert encode_prompt(tokenizer, twice, 1, 9) == [USER_ID, 1097, USER_ID, 1098, ASSISTANT_ID]
    assert encode_prompt(tokenizer, talk("a", "b"), 1, 9) == [USER_ID, 1097, ASSISTANT_ID, 1098]
    for messages in ([], talk(system="s"), talk("\ud800"), [{"role": "tool", "content": "1"}]):
        with pytest.raises(ValueError):
            encode_prompt(tokenizer, messages, 1, 9)
    for new, length in ((9, 9), (-1, 9), (True, 9), (1.0, 9), (1, 0)):
        with pytest.raises(ValueError, match="is not valid"):
            encode_prompt(tokenizer, talk("a"), new, length)
    for length in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="max_length = "):
            encode_conversation(tokenizer, talk("a", "b"), length)
