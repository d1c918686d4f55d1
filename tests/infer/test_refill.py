"""Many prompts over few rows: the same continuations as all at one time, with less waiting than in fixed batches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bc2_jax.config.lora import LoraConfig
from bc2_jax.infer import engine
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.refill import RolloutShapes, Stopped, continue_many
from bc2_jax.infer.settings import Settings
from bc2_jax.model.lora import init_adapter, with_adapter
from tests.convert.models import GOLDEN
from tests.infer.batch import SMALL, prepared_golden, prepared_small, small_model

# A thirtieth of the vocabulary ends an answer: lengths of all kinds.
DRAWN = Settings(
    max_new_tokens=40, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=5, eos_token_id=range(16)
)  # fmt: skip


def make_prompts(count: int, seed: int, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 500, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def small() -> Prepared:
    return prepared_small()


def scheduled_steps(lengths: list[int], rows: int, group: int) -> int:
    """Decoding steps for answers of these lengths, which need length - 1 each, counted without a model."""
    waiting, running, steps = [length - 1 for length in lengths], [], 0
    while waiting or running:
        free = rows - len(running)
        running, waiting = running + waiting[:free], waiting[free:]
        taken = min(group, max(running))
        steps += taken
        running = [left - taken for left in running if left > taken]
    return steps


def test_greedy_rollouts_are_those_of_pytorch():
    """Two rows for four prompts, refilled after the first that ends."""
    expected = dict(np.load(GOLDEN / "align/rollout.npz"))
    prompts = [row[:n].tolist() for row, n in zip(expected["prompts"], expected["prompt_lengths"], strict=True)]
    settings = Settings(
        max_new_tokens=12, temperature=0, repetition_penalty=1, eos_token_id=int(expected["eos_token_id"])
    )
    options = dict(rows=2, log_probs=True, log_prob_temperature=0.7, group=3)
    found, _ = continue_many(prepared_golden("rope-tiny"), prompts, settings, **options)
    for row, continuation in enumerate(found):
        count = expected["length"][row]
        assert continuation.tokens == expected["tokens"][row, :count].tolist()
        assert continuation.reason == ("eos" if expected["ended"][row] else "length")
        np.testing.assert_allclose(continuation.log_probs, expected["logps_t07"][row, :count], atol=2e-5)


@pytest.mark.parametrize(("shape", "rows", "places"), [(None, 3, 2), ((1, 2, 2), 8, 4)])
def test_continuations_are_those_of_all_at_one_time(small, mesh_of, shape, rows, places):
    """On a mesh with whole weights, under the loop's transfer guard; other prompts and another seed compile nothing."""
    prepared = small if shape is None else engine.prepare(small_model(mesh_of(*shape)), whole=True)
    prompts = make_prompts(11, seed=1, longest=80)
    expected = continue_prompts(small, prompts, DRAWN, log_probs=True)
    programs, options = engine.programs(prepared.compute), dict(rows=rows, log_probs=True, prompt_slots=80)
    with jax.transfer_guard("disallow"):
        found, stats = continue_many(prepared, prompts, DRAWN, group=4, **options)
        counts = [program._cache_size() for program in programs]
        others = make_prompts(11, seed=2)
        again = dataclasses.replace(DRAWN, seed=6)
        other, _ = continue_many(prepared, others, again, group=3, **options)
        assert [program._cache_size() for program in programs] == counts
    expected += continue_prompts(small, others, again, log_probs=True)
    for one, alone in zip(found + other, expected, strict=True):
        assert (one.tokens, one.reason) == (alone.tokens, alone.reason)
        if shape is None:
            assert one.log_probs == alone.log_probs, "bit for bit"
        np.testing.assert_allclose(one.log_probs, alone.log_probs, atol=1e-5)
    two_chunks = sum(len(prompt) > engine.chunk_length() for prompt in prompts)
    assert two_chunks > 0
    assert -(-11 // places) < stats.prefills <= 11 + two_chunks


def test_shapes(mesh_of):
    """A quarter of the rows is started together, of each part at least two on a CPU, and never more than there are."""
    assert RolloutShapes.of(16, None, 200) == RolloutShapes(rows=16, prefill_rows=4, slots=256)
    assert RolloutShapes.of(3, None, 100) == RolloutShapes(3, 2, 128)
    assert RolloutShapes.of(1, None, 1) == RolloutShapes(1, 1, 128)
    assert RolloutShapes.of(8, 8, 257) == RolloutShapes(8, 8, 512)
    with jax.set_mesh(mesh_of(2, 2, 1)):
        assert RolloutShapes.of(16, None, 100) == RolloutShapes(16, 8, 128)
        assert RolloutShapes.of(4, None, 100) == RolloutShapes(4, 4, 128)


@hypothesis_settings(max_examples=5)
@given(count=st.integers(1, 12), group=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_rows_are_used_as_a_schedule_of_the_lengths_says(small, count, group, seed):
    settings = dataclasses.replace(DRAWN, seed=seed)
    prompts = make_prompts(count, seed)
    runs = [continue_many(small, prompts, settings, rows=3, log_probs=True, prompt_slots=32, group=group) for _ in "ab"]
    assert runs[0] == runs[1]  # bit for bit
    found, stats = runs[0]
    lengths = [len(continuation.tokens) for continuation in found]
    assert stats.decode_steps == scheduled_steps(lengths, 3, group)
    assert stats.row_steps_used == sum(lengths) - count
    assert stats.row_steps_total == 3 * stats.decode_steps
    assert stats.row_steps_in_batches == sum(3 * (max(lengths[i : i + 3]) - 1) for i in range(0, count, 3))


def test_adapters_and_the_actors_own_arrays():
    """A model with adapters is prepared beside its own arrays, which stay and are shared where they need no change."""
    model = small_model()
    adapter = LoraConfig(rank=2)
    params = init_adapter(adapter, SMALL, nnx.to_pure_dict(nnx.split(model)[1]), 0, None)
    actor = with_adapter(model, adapter, jax.tree.map(lambda x: x + 0.1, params))
    held = jax.tree.leaves(nnx.split(actor)[1])
    prompts = make_prompts(5, seed=3)
    settings = dataclasses.replace(DRAWN, temperature=0)
    found, _ = continue_many(engine.prepare(actor), prompts, settings, rows=3, log_probs=True)
    forward = jax.jit(lambda ids: actor(ids))
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(prompt + continuation.tokens)] = prompt + continuation.tokens
        logits = forward(ids)[0, len(prompt) - 1 : len(prompt + continuation.tokens) - 1]
        assert logits.argmax(-1).tolist() == continuation.tokens
    base, _ = continue_many(prepared_small(), prompts, settings, rows=3, log_probs=True)
    assert [c.tokens for c in found] != [c.tokens for c in base]
    assert not any(x.is_deleted() for x in held)


def test_it_stops_when_it_is_told_to(small):
    told: list[str] = []

    def progress(text: str) -> bool:
        told.append(text)
        return len(told) < 2

    with pytest.raises(Stopped):
        continue_many(small, make_prompts(9, seed=1), DRAWN, rows=3, log_probs=True, prompt_slots=32, progress=progress)
    assert len(told) == 2 and told[0].startswith("answer ") and told[0].endswith(" of 9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=0), "rows = 0 is not valid: it must be a positive multiple of 1, the parts of a batch"),
        (dict(rows=2.0), "rows = 2.0 is not valid"),
        (dict(prefill_rows=-1), "prefill_rows = -1 is not valid"),
        (dict(prefill_rows=3), "prefill_rows = 3 is not valid: it must be at most rows = 2"),
        (dict(group=0), "group = 0 is not valid"),
        (dict(group=9), r"group = 9 is not valid: it must be a whole number in 1\.\.8"),
        (dict(prompt_slots=3), "prompt_slots = 3 is not valid: .* at least the 4 tokens of the longest prompt"),
        (dict(log_prob_temperature=0.0), "log_prob_temperature = 0.0 is not valid"),
        (dict(limits=[0]), r"limits = \[0\] is not valid: they must be in 1\.\.40"),
        (dict(limits=[41]), r"limits = \[41\] is not valid"),
        (dict(limits=[1, 1]), r"max_new_tokens = \[1, 1\] is not valid: it must be one number or 1, one a prompt"),
    ],
)
def test_it_refuses(small, change, message):
    with pytest.raises(ValueError, match=message):
        continue_many(small, [[5, 6, 7, 8]], DRAWN, **{"rows": 2, **change})


def test_rows_must_suit_the_mesh(mesh_of):
    prepared = engine.prepare(small_model(mesh_of(2, 2, 1)))
    with pytest.raises(ValueError, match="rows = 6 is not valid: it must be a positive multiple of 4"):
        continue_many(prepared, [[5]], DRAWN, rows=6)


def test_each_prompt_may_have_its_own_number_of_new_tokens(small):
    """The largest of the numbers would not fit behind the longest prompt; no slots are held for it."""
    settings = dataclasses.replace(DRAWN, eos_token_id=())
    prompts, limits = [[*range(5, 5 + count)] for count in (3, 20, 10)], [9, 2, 60]
    expected, _ = continue_many(small, prompts, settings, rows=3, log_probs=True, prompt_slots=32)
    counts = [program._cache_size() for program in engine.programs(small.compute)]
    most = dataclasses.replace(settings, max_new_tokens=500)
    found, _ = continue_many(small, prompts, most, rows=3, log_probs=True, limits=limits)
    assert [program._cache_size() for program in engine.programs(small.compute)] == counts
    assert [(len(one.tokens), one.reason) for one in found] == [(limit, "length") for limit in limits]
    for one, other in zip(found, expected, strict=True):
        assert one.tokens[:40] == other.tokens[: len(one.tokens)]


def test_rows_end_where_the_caller_stops_them(small):
    """Every second answer is stopped at 10 tokens: it is the beginning of the whole one, and its row is free."""
    prompts, settings = make_prompts(9, seed=1), dataclasses.replace(DRAWN, eos_token_id=())
    options = dict(rows=3, log_probs=True, prompt_slots=32, group=4)
    whole, all_steps = continue_many(small, prompts, settings, **options)

    def stops(so_far):
        assert len(so_far) <= 3
        return {place for place, tokens in so_far.items() if place % 2 and len(tokens) >= 10}

    found, steps = continue_many(small, prompts, settings, stops=stops, **options)
    for place, (one, other) in enumerate(zip(found, whole, strict=True)):
        if place % 2:
            assert one.reason == "stopped" and 10 <= len(one.tokens) < 14
            assert one.tokens == other.tokens[: len(one.tokens)]
        else:
            assert one == other
    assert steps.decode_steps < all_steps.decode_steps
