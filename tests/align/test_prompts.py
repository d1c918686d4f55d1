"""Prompts of files in every format, and the order in which iterations have them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align.chat import encode_prompt
from bc2_jax.align.prompts import Prompt, load_prompts, prompts_of, read_prompts
from bc2_jax.data.records import Invalid

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}
ANSWER, MORE = {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "More"}


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(tmp_path, *records) -> list[Prompt | Invalid]:
    return list(read_prompts([write(tmp_path / "prompts.jsonl", *records)]))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "Hi", "answer": 3}, [USER]),
        ("Hi", [USER]),
        ({"prompt": [SYSTEM, USER, ANSWER, MORE], "length": 9}, [SYSTEM, USER, ANSWER, MORE]),
        ({"prompt": USER, "system": "S"}, [SYSTEM, USER]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: More\n\nAssistant:"}, [USER, ANSWER, MORE]),
        ({"prompt": [USER, ANSWER]}, [USER, ANSWER]),  # the beginning of an answer
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER, MORE, ANSWER]}, [USER, ANSWER, MORE]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, [USER]),
        ({"instruction": "Hi", "input": "", "output": "Yes"}, [USER]),
        ({"instruction": "More", "history": [["Hi", "Yes"]]}, [USER, ANSWER, MORE]),
        ({"prompt": "Hi", "completion": "Yes"}, [USER]),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, [USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, MORE]}, [USER]),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, [USER]),
        ({"question": "Hi", "answer": "3", "prompt": None}, [USER]),
        ({"problem": "Hi", "solution": "3", "steps": [{"text": "a"}]}, [USER]),
    ],
)  # fmt: skip
def test_a_prompt_of_every_shape(tmp_path, record, messages):
    [prompt] = read(tmp_path, record)
    assert isinstance(prompt, Prompt) and prompt.messages == messages
    assert prompt.fields == (record if isinstance(record, dict) else {"prompt": "Hi"})
    assert prompt.question == [message["content"] for message in messages if message["role"] == "user"][-1]
    assert prompt.where.endswith("prompts.jsonl:1")


def test_a_list_in_an_object(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"data": [{"prompt": "Hi", "level": 1}, {"prompt": ""}]}))
    first, second = read_prompts([path])
    assert first.fields == {"prompt": "Hi", "level": 1} and first.where.endswith("(item 1 of 'data')")
    assert isinstance(second, Invalid) and second.where.endswith("(item 2 of 'data')")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": ""}, "the user message is empty"),
        ({"prompt": " \n"}, "the user message is empty"),
        ({"prompt": 3}, "prompt is not a list of messages"),
        ({"prompt": []}, "no question"),
        ({"messages": [SYSTEM]}, "no question"),
        ({"messages": [ANSWER]}, "no question"),
        ({"messages": [USER, USER]}, "two user messages in a row"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tools"),
        ({"prompt": "Hi", "images": ["a.png"]}, "pictures"),
        ({"question": 5}, "content is not text"),
        ({"text": "Hi"}, "no prompt"),
        ({"prompt": "\ud800"}, "a lone surrogate"),
        (7, "no object"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, record, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps(record) + "\n")
    _, found = read_prompts([path])
    assert isinstance(found, Invalid) and reason in found.reason and found.where.endswith("prompts.jsonl:2")


def test_long_prompts_are_left_out_and_counted(tmp_path, small_tokenizer):
    records = [{"prompt": "the cat"}, {"prompt": "the cat sat on the mat and the dog sat on the log"}, {"prompt": ""}]
    path = write(tmp_path / "prompts.jsonl", *records)
    whole = [encode_prompt(small_tokenizer, [{"role": "user", "content": r["prompt"]}], 1, 4096) for r in records[:2]]
    found = load_prompts([path], small_tokenizer, len(whole[1]))
    assert found.ids == whole and found.too_long == [] and len(found.invalid) == 1
    found = load_prompts([path], small_tokenizer, len(whole[1]) - 1)
    assert found.ids == whole[:1] and [p.where for p in found.too_long] == [f"{path}:2"]
    assert found.describe() == (
        f"1 prompts of {len(whole[0])} to {len(whole[0])} tokens; left out: 1 are too long, the first at {path}:2; "
        f"1 can't be used, the first at {path}:3"
    )
    with pytest.raises(ValueError, match=r"ppo.prompts = .* it holds no prompt: 2 have more than 1 tokens; 1 can't be"):
        load_prompts([path], small_tokenizer, 1, "ppo.prompts")


def test_nothing_to_read(tmp_path, small_tokenizer):
    with pytest.raises(ValueError, match="ppo.prompts"):
        load_prompts([tmp_path / "none.jsonl"], small_tokenizer, 9, "ppo.prompts")


@given(count=st.integers(1, 20), per_step=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_each_epoch_has_every_prompt_once(count, per_step, seed):
    order = [place for iteration in range(5) for place in prompts_of(iteration, count, per_step, seed)]
    assert len(order) == 5 * per_step
    epochs = [order[i : i + count] for i in range(0, len(order) - count + 1, count)]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)


def test_orders_differ_by_seed_and_epoch():
    orders = [tuple(prompts_of(iteration, 30, 30, seed)) for iteration in (0, 1) for seed in (0, 1)]
    assert len(set(orders)) == 4 and orders[0] == tuple(prompts_of(0, 30, 30, 0))
