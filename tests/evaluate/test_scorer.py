"""Scores are those of lm-eval's HF backend, whatever is scored together, in whatever batches, on whatever mesh."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from bc2_jax.evaluate import Scorer
from tests.evaluate import golden

TASKS = [task for task in golden.GOLDEN["requests"] if task != "g_ppl"]


@functools.cache
def scorer() -> Scorer:
    return Scorer(golden.model(), golden.tokenizer())


@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_are_those_of_lm_eval(task):
    pairs, expected = golden.pairs(task), golden.GOLDEN["requests"][task]
    first = next(request for request in expected if "context" in request)
    assert pairs[expected.index(first)][0] == first["context"]
    for pair, request in zip(pairs, expected, strict=True):
        encoded = scorer().encode_pair(*pair)
        assert (encoded.continuation, len(encoded.context)) == (request["continuation_ids"], request["context_tokens"])
    found = scorer().loglikelihood(pairs)
    values = np.array([request["loglikelihood"] for request in expected])
    np.testing.assert_allclose([log_prob for log_prob, _ in found], values, rtol=1e-5, atol=1e-4)
    assert [is_greedy for _, is_greedy in found] == [request["is_greedy"] for request in expected]


def test_rolling_is_that_of_lm_eval():
    texts = [item["text"] for item in golden.lines("ppl.jsonl")]
    found, expected = scorer().roll(texts), golden.GOLDEN["requests"]["g_ppl"]
    assert [rolled.tokens for rolled in found] == [request["num_tokens"] for request in expected]
    np.testing.assert_allclose(
        [rolled.log_prob for rolled in found], [request["loglikelihood"] for request in expected], rtol=2e-6
    )


def test_generations_are_those_of_lm_eval():
    items, expected = golden.lines("gen.jsonl"), golden.GOLDEN["generations"]
    found = scorer().generate_texts([(item["prompt"], item["until"], item["max_gen_toks"]) for item in items])
    # lm-eval's tokenizer library gives up whole runs of bytes where one character in them is not complete.
    whole = [e["text"] if "\ufffd" not in e["text"] else golden.tokenizer().decode(e["token_ids"]) for e in expected]
    assert [generated.text for generated in found] == whole
    assert [generated.tokens for generated in found] == [len(request["token_ids"]) for request in expected]


def test_scored_generations_are_those_of_lm_eval():
    prompts = {item["id"]: item["prompt"] for item in golden.lines("gen.jsonl")}
    contexts = [prompts[item["doc"]] for item in golden.GOLDEN["generations"] if item["text"]]
    expected = golden.GOLDEN["scored_generations"]
    found = scorer().loglikelihood([(c, e["continuation"]) for c, e in zip(contexts, expected, strict=True)])
    np.testing.assert_allclose(
        [log_prob for log_prob, _ in found], [e["loglikelihood"] for e in expected], rtol=1e-5, atol=1e-4
    )
    assert [is_greedy for _, is_greedy in found] == [e["is_greedy"] for e in expected]
