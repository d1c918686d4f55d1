"""Questions asked at evaluations: which are read, how they are batched, what counts as right."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bc2_jax.align import questions
from bc2_jax.config import DataConfig, FineTuneConfig, ModelConfig, QuestionsConfig, SourceConfig
from bc2_jax.infer.generate import Continuation

CONFIG = FineTuneConfig(
    name="test", num_steps=1,
    model=ModelConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
        vocab_size=640, model_max_length=64,
    ),
    data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="none", sequence_length=64, global_batch_size=4),
)  # fmt: skip


def read(tokenizer, path, records, **changes):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    asked = QuestionsConfig(path=str(path), **({"max_new_tokens": 8} | changes))
    return questions.read_questions(asked.path, asked, 64, tokenizer)


def conversation(*texts: str) -> dict:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def test_the_first_are_read_in_any_format(tokenizer, tmp_path):
    records = [
        conversation("def f():", "pass", "and now?", "return"), {"instruction": "a", "input": "b", "output": "c"},
        conversation("x", "y"),
    ]  # fmt: skip
    first, second = read(tokenizer, tmp_path / "q.jsonl", records, limit=2)
    assert (len(first.messages), first.expected, second.expected) == (3, "return", "c")
    assert second.messages[-1]["content"] == "a\nb"
    for question in (first, second):
        assert question.ids[0] == tokenizer.user_id and question.ids[-1] == tokenizer.assistant_id
    assert len(read(tokenizer, tmp_path / "q.jsonl", records, limit=0)) == 3
    assert questions.find_questions(CONFIG) is None
    assert questions.read_questions(None, CONFIG.questions, 64, tokenizer) == []


@pytest.mark.parametrize(
    "records, changes, message",
    [
        ([], {}, "questions.path = .* is not valid: it holds no conversation"),
        ([conversation("a", "b"), conversation("a", "b", "c", "")], {}, "questions.path: .*q.jsonl.*2.* is empty"),
        ([{"messages": [{"role": "assistant", "content": "hello"}]}], {}, "has no question before its answer"),
        ([conversation("a", "b")], {"max_new_tokens": 64}, "max_new_tokens = 64 is not valid: it must be below"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(tokenizer, tmp_path, records, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tokenizer, tmp_path / "q.jsonl", records, **changes)


@pytest.mark.parametrize("count, shapes", [(2, [2]), (4, [4]), (5, [4, 4]), (7, [4, 4, 4])])
def test_batches_have_one_shape(tokenizer, monkeypatch, count: int, shapes: list[int]):
    asked = [questions.Question([], "ok", [9] * (3 + i % 5)) for i in range(count)]
    seen = []

    def continue_prompts(model, prompts, settings):
        seen.append(prompts)
        return [Continuation([*tokenizer.encode(" ok "), tokenizer.eos_id], "eos", None) for _ in prompts]

    monkeypatch.setattr(questions, "AT_ONCE", 4)
    monkeypatch.setattr(questions, "continue_prompts", continue_prompts)
    monkeypatch.setattr(questions, "engine", SimpleNamespace(prepare=lambda model: model))
    answers = questions.answer_questions(None, tokenizer, asked, 8, lambda done: True)
    assert [len(prompts) for prompts in seen] == shapes
    assert {max(map(len, prompts)) for prompts in seen} == {max(len(q.ids) for q in asked)}
    assert len(answers) == count and all(answer.right for answer in answers)
    stopped = questions.answer_questions(None, tokenizer, asked, 8, lambda done: False)
    assert stopped is None and len(seen) == len(shapes) + 1


def test_right_is_what_ends_and_equals(tokenizer, monkeypatch):
    said = [("ok", "eos"), ("ok", "length"), ("no", "eos")]
    found = [
        Continuation([*tokenizer.encode(text), *([tokenizer.eos_id] if reason == "eos" else [])], reason, None)
        for text, reason in said
    ]
    monkeypatch.setattr(questions, "continue_prompts", lambda model, prompts, settings: found)
    monkeypatch.setattr(questions, "engine", SimpleNamespace(prepare=lambda model: model))
    asked = [questions.Question([], "ok\n", [9])] * 3
    answers = questions.answer_questions(None, tokenizer, asked, 8, lambda done: True)
    assert [(a.ended, a.right) for a in answers] == [(True, True), (False, False), (True, False)]
    length = sum(len(c.tokens) for c in found) / 3
    expected = {"answers_ended": 2 / 3, "answers_right": 1 / 3, "answer_tokens": length}
    assert questions.summarize(answers) == pytest.approx(expected)
