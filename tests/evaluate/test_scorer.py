"""Scores are those of lm-eval's HF backend, whatever is scored together, in whatever batches, on whatever mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.evaluate import Scorer
from bc2_jax.evaluate.encoding import Request
from bc2_jax.model.baichuan import Baichuan2
from tests.evaluate import golden
from tests.infer.test_score import load

TASKS = [task for task in golden.GOLDEN["requests"] if task != "g_ppl"]


def asked(task: str) -> slice:
    """All requests; of prompts that are cut to the whole context, and so share nothing, some with each letter."""
    return slice(None, None, 13 if task.endswith("5shot") else None)


@functools.cache
def scorer() -> Scorer:
    return Scorer(golden.model(), golden.tokenizer(), rows=2, row_length=512)  # one shape for all tasks


@functools.cache
def log_likelihoods() -> dict[str, list[tuple[float, bool]]]:
    """Those of all tasks and of the golden generations, scored together."""
    prompts = {item["id"]: item["prompt"] for item in golden.lines("gen.jsonl")}
    contexts = [prompts[item["doc"]] for item in golden.GOLDEN["generations"] if item["text"]]
    continuations = [expected["continuation"] for expected in golden.GOLDEN["scored_generations"]]
    pairs = {task: golden.pairs(task)[asked(task)] for task in TASKS}
    pairs["scored_generations"] = list(zip(contexts, continuations, strict=True))
    found = iter(scorer().loglikelihood([pair for of_task in pairs.values() for pair in of_task]))
    return {name: [next(found) for _ in of_task] for name, of_task in pairs.items()}


def check_log_likelihoods(found: list[tuple[float, bool]], expected: list[dict[str, Any]]) -> None:
    values = np.array([request["loglikelihood"] for request in expected])
    np.testing.assert_allclose([log_prob for log_prob, _ in found], values, rtol=1e-5, atol=1e-4)
    assert [is_greedy for _, is_greedy in found] == [request["is_greedy"] for request in expected]


@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_are_those_of_lm_eval(task):
    pairs, expected = golden.pairs(task), golden.GOLDEN["requests"][task]
    first = next(request for request in expected if "context" in request)
    assert pairs[expected.index(first)][0] == first["context"]
    for pair, request in zip(pairs, expected, strict=True):
        encoded = scorer().encode_pair(*pair)
        assert (encoded.continuation, len(encoded.context)) == (request["continuation_ids"], request["context_tokens"])
    check_log_likelihoods(log_likelihoods()[task], expected[asked(task)])


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
    kept = [golden.GOLDEN["max_length"] - item["max_gen_toks"] for item in items]
    cut = [max(request["prompt_tokens"] - room, 0) for request, room in zip(expected, kept, strict=True)]
    assert [generated.cut for generated in found] == cut and any(cut)


def test_scored_generations_are_those_of_lm_eval():
    check_log_likelihoods(log_likelihoods()["scored_generations"], golden.GOLDEN["scored_generations"])


# ------------------------------------------------------------------------------------------- what must change nothing

LIMIT = 24
SHORT = st.lists(st.integers(3, 6), min_size=1, max_size=14)
REQUESTS = st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=12)


@functools.cache
def tiny(mesh=None) -> Baichuan2:
    """Of ALiBi; the golden model above rotates positions."""
    return load("alibi-tiny", mesh)


@functools.cache
def logits() -> Callable[[np.ndarray], jax.Array]:
    return jax.jit(tiny())


def alone(request: Request) -> tuple[np.ndarray, bool]:
    """Log-probabilities and greediness by the logits of one request alone."""
    whole = [*request.context, *request.continuation][-LIMIT - 1 :]
    ids = np.zeros((1, LIMIT), np.int32)
    ids[0, : len(whole) - 1] = whole[:-1]
    n = len(request.continuation)
    here = np.array(logits()(ids), np.float64)[0, len(whole) - 1 - n : len(whole) - 1]
    log_probs = here - np.log(np.exp(here).sum(-1, keepdims=True))
    labels = np.array(request.continuation)
    return log_probs[np.arange(n), labels], bool((here.argmax(-1) == labels).all())


@functools.cache
def tiny_scorer(rows: int = 2, row_length: int = 64, mesh=None) -> Scorer:
    return Scorer(tiny(mesh), golden.tokenizer(), max_length=LIMIT, rows=rows, row_length=row_length)


@settings(max_examples=10)
@given(REQUESTS, REQUESTS, SHORT)
def test_packed_with_shared_beginnings_is_as_alone(requests, others, shots):
    requests += [(shots + context, continuation) for context, continuation in others]
    for request, score in zip(requests, tiny_scorer().score(requests), strict=True):
        expected, is_greedy = alone(Request(*request))
        np.testing.assert_allclose(score.log_probs, expected, atol=1e-5)
        np.testing.assert_allclose(score.log_prob, expected.sum(), atol=1e-5 * len(expected))
        assert score.is_greedy == is_greedy or score.near_tie
        assert score.cut == max(len(request[0]) + len(request[1]) - LIMIT - 1, 0)


def test_order_rows_and_row_length_change_nothing(mesh_of):
    rng = np.random.default_rng(0)
    shots = rng.integers(3, 100, 9).tolist()
    requests = [(shots + rng.integers(3, 100, rng.integers(1, 9)).tolist(), [n + 3]) for n in range(20)]
    requests += [(context, rng.integers(3, 100, rng.integers(1, 6)).tolist()) for context, _ in requests[:8]]
    expected = [score.log_prob for score in tiny_scorer().score(requests)]
    order = rng.permutation(len(requests))
    for scorer, tolerance in (
        (tiny_scorer(1, 40), 1e-5), (tiny_scorer(3, 64, mesh_of(2, 2, 2)), 2e-5),
    ):  # fmt: skip
        found = scorer.score([requests[i] for i in order])
        np.testing.assert_allclose([score.log_prob for score in found], np.array(expected)[order], atol=tolerance)
    stats = tiny_scorer(1, 40).stats
    assert stats.tokens_fed < stats.tokens_unshared / 2
    assert stats.slots == 40 * stats.batches
    assert 0 <= stats.padding_share < 0.3


def test_one_letter_more_costs_no_token():
    """Letters behind the same question, as the shots show them and bare, are places of the same hidden states."""
    scorer = Scorer(tiny(), golden.tokenizer(), rows=2, row_length=64)
    context = [70, 71, 72, 73]
    one = scorer.score([Request(context, [5])])[0]
    fed = scorer.stats.tokens_fed
    all_ = scorer.score([Request(context, [n]) for n in range(3, 11)])
    assert all_[2].log_prob == pytest.approx(one.log_prob, abs=1e-6)
    assert (fed, scorer.stats.tokens_fed) == (4, 8)


def test_near_ties_are_told():
    """Two rows of the head are one: the first of both is greedy, and neither is sure."""
    graphdef, state = nnx.split(tiny())
    params = nnx.to_pure_dict(state)
    context = [3, 4, 5]
    best = int(np.argmax(logits()(np.pad([context], ((0, 0), (0, LIMIT - 3))))[0, 2]))
    twin = best + 1
    weight = params["lm_head"]["weight"]
    params["lm_head"]["weight"] = weight.at[twin].set(weight[best])
    scorer = Scorer(nnx.merge(graphdef, params), golden.tokenizer(), rows=2, row_length=64)
    first, second, far = scorer.score([(context, [best]), (context, [twin]), (context, [best - 1])])
    assert (first.is_greedy, second.is_greedy, far.is_greedy) == (True, False, False)
    assert (first.near_tie, second.near_tie, far.near_tie) == (True, True, False)
    assert scorer.stats.near_ties == 2


def test_what_cannot_be_scored_is_named():
    scorer = tiny_scorer()
    most = scorer.model.config.vocab_size
    for request, told in (
        (([], [5]), r"\.context = \[\] is not valid: .* at least one token id"),
        (([5], []), r"\.continuation = \[\] is not valid"),
        (([5], [most]), "continuation that is not in"),
        (([0.5], [5]), r"\.context = \[0.5\] is not valid"),
        (([5], [5], [5]), "two lists of token ids, context and continuation"),
        (([-1], [5]), "context that is not in"),
        (([5], [5] * (LIMIT + 1)), f"{LIMIT + 1} tokens; max_length = {LIMIT}"),
    ):
        with pytest.raises(ValueError, match=rf"requests\[1\].*{told}"):
            scorer.score([([3], [4]), request])
    for name, value in (("max_length", 0), ("rows", 1.5), ("row_length", -1), ("prefix_id", most)):
        with pytest.raises(ValueError, match=name):
            Scorer(scorer.model, scorer.tokenizer, **{name: value})
    with pytest.raises(ValueError, match="stride"):
        scorer.roll(["a"], stride=LIMIT + 1)
    with pytest.raises(ValueError, match="texts is one text: it must be a list of texts"):
        scorer.rolling("ab")
    assert scorer.score([]) == [] and scorer.generate([]) == [] and scorer.rolling([]) == []
