"""Rows of one batch that start, end and are replaced at different times, each as if it were alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.engine import Decoding, Prepared, Reason
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.sampling import Settings, sampling_of
from bc2_jax.model.baichuan import Baichuan2, param_shardings, split_model

GREEDY = dict(temperature=0.0, repetition_penalty=1.0)
DRAWN = dict(temperature=1.0, top_k=0, top_p=0.9, seed=3)
PROMPTS = [[5, 6, 7], [11, 300, 42, 9, 9, 17, 250], [3], [8, 1, 4, 4]]
ON_ROWS, ON_BOTH, ON_CONTEXT = (2, 1, 2), (1, 2, 2), (1, 2, 1, 1, 2)  # data, fsdp, tensor, fsdp_inner, context


def prepare(golden, mesh=None) -> Prepared:
    graphdef = split_model(golden.config, ComputeConfig(dtype="float32", attention_block=16, scan_layers=True))[0]
    shardings = None if mesh is None else param_shardings(golden.config, mesh)
    return engine.prepare(nnx.merge(graphdef, jax.device_put(golden.params, shardings)))


@pytest.fixture(scope="module")
def small() -> Prepared:
    """For what does not depend on the architecture."""
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="rope",
        vocab_size=512, model_max_length=512,
    )  # fmt: skip
    return engine.prepare(Baichuan2(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0)))


def start(prepared: Prepared, prompts, settings, *, places=None, length: int = 64, left: bool = False, log_probs=True):
    """A prefill of 16 columns; None is no prompt."""
    rows = [row.check(prepared.config) for row in settings]
    ids, segments = np.zeros((2, len(prompts), 16), np.int32)
    for b, prompt in enumerate(prompts):
        where = slice(16 - len(prompt or []), None) if left else slice(len(prompt or []))
        ids[b, where], segments[b, where] = prompt or [], 1
    sampling = sampling_of(rows, places or range(len(prompts)))
    top_k = rows[0].top_k if sampling.temperature is not None else 0
    return engine.prefill(prepared, ids, segments, sampling, length=length, top_k=top_k, log_probs=log_probs), top_k


def tokens(decoding: Decoding, row: int) -> list[int]:
    return np.asarray(decoding.output_BS)[row, : int(decoding.step_B[row])].tolist()


# ---------------------------------------------------------------------------------------------------- rows on their own


@pytest.mark.parametrize(
    ("shape", "left"), [(None, True), (None, False), (ON_BOTH, False), (ON_ROWS, True), (ON_CONTEXT, False)]
)
def test_ragged_rows_equal_each_alone(golden, mesh_of, shape, left):
    mesh = None if shape is None else mesh_of(*shape)
    settings = [Settings(max_new_tokens=n, eos_token_id=0, **GREEDY) for n in (12, 5, 9, 1)]
    prepared = prepare(golden, mesh)
    decoding, _ = start(prepared, PROMPTS, settings, left=left)
    lengths = [16] * 4 if left else [len(prompt) for prompt in PROMPTS]
    np.testing.assert_array_equal(decoding.cache.length, lengths)
    decoding = engine.decode(prepared, decoding, top_k=0, steps=64)
    alone = prepare(golden)
    for row, prompt in enumerate(PROMPTS):
        (expected,) = continue_prompts(alone, [prompt], settings[row], log_probs=True)
        count = len(expected.tokens)
        assert tokens(decoding, row) == expected.tokens
        np.testing.assert_allclose(decoding.log_probs_BS[row, :count], expected.log_probs, atol=1e-5)
        assert decoding.reason_B[row] == (Reason.EOS if expected.reason == "eos" else Reason.LIMIT)
        # The newest token is not in the cache; a row that has ended stays as it was.
        assert int(decoding.cache.length[row]) == lengths[row] + count - 1


def test_log_probs_are_those_of_the_full_forward_pass(golden):
    prepared = prepare(golden)
    settings = [Settings(max_new_tokens=10, temperature=1.5, top_k=0, seed=2)] * 4
    decoding, top_k = start(prepared, PROMPTS, settings)
    decoding = engine.decode(prepared, decoding, top_k=top_k, steps=64)
    forward = jax.jit(lambda prepared, ids: jax.nn.log_softmax(prepared.merge()(ids)))
    for row, prompt in enumerate(PROMPTS):
        new = tokens(decoding, row)
        ids = np.zeros((1, 32), np.int32)  # of one length, to compile once; nothing sees what comes after it
        ids[0, : len(prompt + new)] = prompt + new
        log_probs = np.asarray(forward(prepared, ids)[0, len(prompt) - 1 : len(prompt + new) - 1])
        expected = log_probs[np.arange(len(new)), new]
        np.testing.assert_allclose(decoding.log_probs_BS[row, : len(new)], expected, atol=1e-5)


def test_a_row_that_is_no_prompt_never_runs(small):
    decoding, _ = start(small, [PROMPTS[0], None], [Settings(max_new_tokens=4, **GREEDY)] * 2)
    decoding = engine.decode(small, decoding, top_k=0, steps=8)
    assert int(decoding.reason_B[1]) == Reason.NO_PROMPT and int(decoding.step_B[1]) == 0
    assert int(decoding.cache.length[1]) == 0


def test_a_full_cache_ends_a_row(small):
    """Of 20 slots, 3 are the prompt's; the last token needs none."""
    settings = [Settings(max_new_tokens=100, eos_token_id=0, **GREEDY)] * 2
    decoding, _ = start(small, PROMPTS[:2], settings, length=20)
    decoding = engine.decode(small, decoding, top_k=0, steps=100)
    expected = continue_prompts(small, PROMPTS[:2], Settings(max_new_tokens=18, eos_token_id=0, **GREEDY))
    assert [tokens(decoding, 0), tokens(decoding, 1)] == [expected[0].tokens, expected[1].tokens[:14]]
    assert decoding.reason_B.tolist() == [Reason.LIMIT] * 2


def test_settings_are_a_rows_own(small):
    """Greedy and drawn rows in one program."""
    settings = [
        Settings(max_new_tokens=12, top_k=0, **GREEDY),
        Settings(max_new_tokens=12, top_k=0, temperature=1.2, top_p=0.9, seed=7),
        Settings(max_new_tokens=12, top_k=0, temperature=0.8, top_p=0.95, repetition_penalty=1.3, seed=2**32 - 1),
        Settings(max_new_tokens=12, top_k=0, temperature=0.0, repetition_penalty=1.4),
    ]
    decoding, _ = start(small, PROMPTS, settings, places=[0] * 4)
    decoding = engine.decode(small, decoding, top_k=0, steps=64)
    for row, prompt in enumerate(PROMPTS):
        assert tokens(decoding, row) == continue_prompts(small, [prompt], settings[row])[0].tokens


# --------------------------------------------------------------------------------------------------------------- insert


@pytest.mark.parametrize(
    ("shape", "options"),
    [(None, GREEDY), (None, DRAWN), (ON_BOTH, DRAWN), (ON_ROWS, GREEDY), (ON_CONTEXT, DRAWN)],
)
def test_prompts_that_arrive_later_get_the_same_tokens(golden, mesh_of, shape, options):
    """Two at first, one into a free row while these run, one in the place of a row that was cancelled."""
    mesh = None if shape is None else mesh_of(*shape)
    settings = Settings(max_new_tokens=14, eos_token_id=0, **options)
    expected = [c.tokens for c in continue_prompts(prepare(golden), PROMPTS, settings)]
    prepared = prepare(golden, mesh)
    decoding, top_k = start(prepared, [PROMPTS[0], None, PROMPTS[1], None], [settings] * 4, places=[0, 0, 1, 0])

    def arrive(decoding: Decoding, place: int, row: int) -> Decoding:
        """From a prefill of its own, with fewer slots, where it is the second row."""
        places = [0, place]
        prefilled, _ = start(prepared, [None, PROMPTS[place]], [settings] * 2, places=places, length=16)
        return engine.insert(decoding, prefilled, [1], [row])

    decoding = engine.decode(prepared, decoding, top_k=top_k, steps=3)
    decoding = arrive(decoding, 2, 3)
    decoding = engine.decode(prepared, decoding, top_k=top_k, steps=2)
    assert decoding.step_B.tolist() == [6, 0, 6, 3]
    partial = tokens(decoding, 2)
    decoding = arrive(decoding, 3, 2)
    decoding = engine.decode(prepared, decoding, top_k=top_k, steps=64)
    assert partial == expected[1][:6]
    assert [tokens(decoding, row) for row in (0, 2, 3)] == [expected[0], expected[3], expected[2]]


def test_a_cancelled_row_stops(small):
    settings = [Settings(max_new_tokens=12, eos_token_id=0, **GREEDY)] * 2
    decoding, _ = start(small, PROMPTS[:2], settings)
    decoding = engine.decode(small, decoding, top_k=0, steps=2)
    reason_B = decoding.reason_B.at[0].set(Reason.CANCELLED)
    decoding = engine.decode(small, decoding._replace(reason_B=reason_B), top_k=0, steps=64)
    assert decoding.step_B.tolist() == [3, 12]
    assert tokens(decoding, 1) == continue_prompts(small, [PROMPTS[1]], settings[0])[0].tokens


def test_several_rows_at_once(small):
    settings = [Settings(max_new_tokens=8, eos_token_id=0, **GREEDY)] * 4
    decoding, _ = start(small, [None] * 4, settings)
    prefilled, _ = start(small, PROMPTS, settings)
    decoding = engine.insert(decoding, prefilled, [0, 3, 2], [3, 0, 1])
    decoding = engine.decode(small, decoding, top_k=0, steps=64)
    expected = continue_prompts(small, PROMPTS, settings[0])
    assert [tokens(decoding, row) for row in (3, 0, 1)] == [expected[i].tokens for i in (0, 3, 2)]
    assert int(decoding.reason_B[2]) == Reason.NO_PROMPT


@pytest.mark.parametrize(
    ("change", "rows_from", "rows_to", "message"),
    [
        (dict(length=128), [0], [0], "prefilled has 128 slots; it must have at most those of decoding, 64"),
        (dict(log_probs=False), [0], [0], "prefilled has not the arrays of decoding"),
        ({}, [0, 1], [0], "rows_to = .* is not valid: it must be as many different rows as rows_from"),
        ({}, [0, 1], [1, 1], "rows_to = .* is not valid"),
        ({}, [4], [0], r"rows_from = \[4\] is not valid: rows must be in 0\.\.3"),
        ({}, [0], [-1], r"rows_to = \[-1\] is not valid"),
    ],
)
def test_insert_refuses(small, change, rows_from, rows_to, message):
    settings = [Settings(max_new_tokens=8, **GREEDY)] * 4
    decoding, prefilled = start(small, PROMPTS, settings)[0], start(small, PROMPTS, settings, **change)[0]
    with pytest.raises(ValueError, match=message):
        engine.insert(decoding, prefilled, rows_from, rows_to)


# ------------------------------------------------------------------------------------------------------------- programs


def test_states_are_used_up_and_nothing_is_compiled_again(small):
    settings = [Settings(max_new_tokens=30, temperature=1.0, top_k=4)] * 4

    def session(prompts, steps: int) -> None:
        first, top_k = start(small, prompts, settings)
        second, _ = start(small, prompts, settings, places=[4, 5, 6, 7])
        running = engine.decode(small, first, top_k=top_k, steps=steps)
        assert first.cache.k.is_deleted()
        inserted = engine.insert(running, second, [1], [2])
        assert running.cache.k.is_deleted() and not second.cache.k.is_deleted()
        engine.decode(small, inserted, top_k=top_k, steps=2 * steps)

    session(PROMPTS, 2)
    counts = [program._cache_size() for program in engine.programs(small.compute)]
    session([[9], [1, 2, 3], [4] * 16, None], 5)
    assert [program._cache_size() for program in engine.programs(small.compute)] == counts
