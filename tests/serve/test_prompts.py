"""Prompts of the engine: the ids of a chat, settings, and that no text becomes a role."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align.chat import encode_prompt
from bc2_jax.config import ModelConfig
from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.prompts import Asked, ServedModel, ask_chat, ask_completion, chat_defaults, fit_chat
from bc2_jax.serve.schema import read_chat, read_completion
from bc2_jax.serve.tokens import tokenize
from bc2_jax.tokenizer import Tokenizer
from tests.serve.conftest import LENGTH

LIMITS = Limits()
GOLDEN = Path(__file__).parents[1] / "golden" / "evals" / "tokenizer" / "tokenizer.model"


def chat(model: ServedModel, messages: list[dict], **fields) -> Asked:
    return ask_chat(model, read_chat({"messages": messages, **fields}, LIMITS), "me")


def complete(model: ServedModel, prompt, **fields) -> Asked:
    return ask_completion(model, read_completion({"prompt": prompt, **fields}, LIMITS), "me")


def refused(code: str, call, *args, **fields) -> ApiError:
    with pytest.raises(ApiError) as error:
        call(*args, **fields)
    assert (error.value.status, error.value.code) == (400, code)
    return error.value


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_a_chat_has_the_ids_of_align(served_model):
    messages = [{"role": "system", "content": "s t"}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    asked = chat(served_model, messages, seed=3, n=3)
    expected = encode_prompt(served_model.tokenizer, messages, 99, LENGTH)
    assert [list(request.ids) for request in asked.requests] == [expected] * 3
    assert [request.place for request in asked.requests] == [0, 1, 2] and asked.seed == 3
    assert {request.owner for request in asked.requests} == {"me"} and asked.dropped_rounds == 0
    assert asked.prompt_tokens == len(expected)
    continued = chat(served_model, messages[:3])
    assert continued.prompts[0][-1] != 196  # the answer that is the last message is continued


def test_an_answer_gets_what_fits(served_model):
    """By default there is room for 99 tokens, or for what a long message leaves; it is not cut."""
    for count in (10, 155, 156, 253):
        text = "7" * count  # each digit is a token
        assert len(served_model.tokenizer.encode(text)) == count
        prompt, found = fit_chat(served_model, [user(text)], None)
        assert len(prompt.ids) == count + 2 and (found, prompt.cut_tokens) == (min(99, LENGTH - count - 2), 0)
    error = refused("context_length_exceeded", chat, served_model, [user("7" * 254)])
    assert "256 tokens and 1 new" in error.message
    error = refused("context_length_exceeded", chat, served_model, [user("7" * 190)], max_tokens=99)
    assert "192 tokens and 99 new ones" in error.message and f"{LENGTH} tokens" in error.message
    old = [user("7" * 60), {"role": "assistant", "content": "8"}]
    prompt, found = fit_chat(served_model, [*old, *old, user("9" * 60)], None)
    assert (prompt.dropped_rounds, prompt.cut_tokens, found) == (1, 0, 99)


def test_only_whole_rounds_are_dropped(served_model):
    """Whatever the lengths: no message is cut, and no round dropped that had room."""
    old = [user("7" * 30), {"role": "assistant", "content": "8"}]
    system = {"role": "system", "content": "5"}
    for count in range(60):
        for first in ([], [system]):
            messages = [*first, *old, *old, *old, user("9" * count)]
            prompt, most = fit_chat(served_model, messages, LENGTH - 100)
            lengths = len(first), 33, count + 2
            kept = 3 - prompt.dropped_rounds
            assert len(prompt.ids) == lengths[0] + kept * lengths[1] + lengths[2] <= 100
            assert most == LENGTH - 100 and (kept == 3 or len(prompt.ids) + 33 > 100)
            assert prompt.ids[-1] == 196 and prompt.ids[len(first)] == 195


def test_what_is_no_conversation(served_model):
    system = {"role": "system", "content": "s"}
    for messages in ([system], [user("a"), system], [system, system, user("a")]):
        error = refused("invalid_value", chat, served_model, messages)
        assert error.param == "messages" and error.message.startswith("messages")


def test_settings_that_need_the_model(served_model):
    V = served_model.config.vocab_size
    assert chat(served_model, [user("a")], logit_bias={str(V - 1): 1}).requests[0].settings.logit_bias == {V - 1: 1.0}
    for fields, param in (
        ({"logit_bias": {str(V): 1}}, "logit_bias"), ({"stop_token_ids": [V]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"min_tokens": 100}, "min_tokens"),
        ({"stop_token_ids": list(range(300, 314))}, "stop_token_ids"), ({"top_p": 1e-60}, "top_p"),
    ):  # fmt: skip
        assert refused("invalid_value", chat, served_model, [user("a")], **fields).param == param
    ends = chat(served_model, [user("a")], stop_token_ids=[300, 2]).requests[0].settings.eos_token_id
    assert ends == (2, 195, 196, 300)
    ends = chat(served_model, [user("a")], stop_token_ids=[300], ignore_eos=True).requests[0].settings.eos_token_id
    assert ends == (300,)
    assert complete(served_model, "a", ignore_eos=True).requests[0].settings.eos_token_id == ()
    refused("invalid_value", complete, served_model, [V])
    refused("invalid_value", complete, served_model, [[5], [-1]])


def test_completions(served_model):
    asked = complete(served_model, ["a b", "c"], n=2, echo=True, logprobs=1, max_tokens=0)
    assert asked.echoes == ("a b", "c") and len(asked.requests) == 4 and asked.dropped_rounds is None
    assert {r.settings.max_new_tokens for r in asked.requests} == {1}
    assert {(r.top_log_probs, r.prompt_log_probs) for r in asked.requests} == {(1, 1)}
    ids = served_model.tokenizer.encode("a b")
    assert complete(served_model, [2, *ids], echo=True).echoes == ("a b",)
    assert complete(served_model, "a b", logprobs=1).requests[0].prompt_log_probs is None
    error = refused("context_length_exceeded", complete, served_model, [300] * 250, max_tokens=7)
    assert "250 tokens and 7 new" in error.message


def test_a_model_with_settings_of_its_own():
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        model_max_length=4096, position_embedding="rope",
    )  # fmt: skip
    found, most = chat_defaults({"temperature": 0.0, "top_k": 9, "max_new_tokens": 5000}, config, 4096)
    assert (found["temperature"], found["top_k"], found["repetition_penalty"], most) == (0.0, 9, 1.05, 2048)
    assert chat_defaults({}, config, 1000)[1] == 500
    with pytest.raises(ValueError, match="top_p = 2 is not valid"):
        chat_defaults({"top_p": 2}, config, 4096)


# ------------------------------------------------------------------------------------------------------ no forged role


@pytest.fixture(scope="module", params=["trained here", "of the golden data"])
def model(request, served_model, tokenizer):
    if request.param == "trained here":
        return served_model
    golden = Tokenizer(GOLDEN)
    config = dataclasses.replace(served_model.config, vocab_size=golden.vocab_size)
    return dataclasses.replace(served_model, tokenizer=golden, config=config)


def special_pieces(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]


def specials(model: ServedModel, asked: Asked) -> list[int]:
    return [i for ids in asked.prompts for i in ids if model.tokenizer.is_special(i)]


def test_no_piece_becomes_a_role(model):
    """Every special piece in every place that text can have; the ids have only the roles of the messages."""
    pieces = special_pieces(model.tokenizer)
    assert "<reserved_106>" in pieces and "</s>" in pieces and len(pieces) > 190
    for piece in pieces:
        messages = [
            {"role": "system", "content": piece}, user(f"a{piece}b"),
            {"role": "assistant", "content": piece}, user(piece),
        ]  # fmt: skip
        asked = chat(model, messages)
        assert specials(model, asked) == [195, 196, 195, 196]
        assert model.tokenizer.decode(asked.prompts[0]) == f"{piece}a{piece}b{piece}{piece}"
        assert specials(model, complete(model, piece)) == []
        assert specials(model, complete(model, [piece, "a"])) == []
        found = tokenize(model, {"messages": messages}, LIMITS)["tokens"]
        assert tuple(found) == asked.prompts[0]
        assert not any(map(model.tokenizer.is_special, tokenize(model, {"prompt": piece}, LIMITS)["tokens"]))


@given(data=st.data())
def test_no_split_piece_becomes_a_role(model, data):
    """Nor across the borders of content parts, messages and the roles' own ids."""
    piece = data.draw(st.sampled_from(["<reserved_106>", "<reserved_107>", "</s>", "<s>", "<unk>", "<reserved_0>"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(piece)), max_size=4)))
    texts = [piece[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
    parts = [{"type": "text", "text": text} for text in texts]
    asked = chat(model, [{"role": "user", "content": parts}])
    assert specials(model, asked) == [195, 196] and model.tokenizer.decode(asked.prompts[0]) == piece
    several = chat(model, [{"role": "system", "content": texts[0]}, *map(user, texts)])
    assert specials(model, several) == [*[195] * len(texts), 196]


def test_stop_texts_and_biases_are_no_roles(model):
    """A stop text is a text, whose ids nobody asks for; a bias has ids for keys, and a biased role only ends."""
    body = read_chat({"messages": [user("a")], "stop": ["<reserved_106>", "</s>"]}, LIMITS)
    settings = ask_chat(model, body, "").requests[0].settings
    assert set(settings.eos_token_id) == {2, 195, 196} and body.options.stop == ("<reserved_106>", "</s>")
    for piece in special_pieces(model.tokenizer):
        refused("invalid_value", read_chat, {"messages": [user("a")], "logit_bias": {piece: 100}}, LIMITS)
    assert 195 in chat(model, [user("a")], logit_bias={"195": 100}).requests[0].settings.eos_token_id
