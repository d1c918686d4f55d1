"""The engine's programs: PyTorch's tokens, the full forward pass, settings and ends of rows, meshes, compilation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.config import BAICHUAN2_7B, ComputeConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import Reason, init_cache
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Settings, sampling_of
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.tpu.options import compiler_options
from tests.infer.batch import GREEDY, Batch, Prompt, prepared_golden

LONG, LONGER = (np.random.default_rng(n).integers(3, 320, n).tolist() for n in (150, 250))
SHORT = [[5, 6, 7], [11, 300, 42, 9, 9, 17, 250], [3], [8, 1, 4, 4]]


@functools.cache
def forward():
    """jitted (prepared, ids [1, T]) -> logits [1, T, V] of the whole forward pass."""
    return jax.jit(lambda prepared, ids: prepared.merge()(ids))


def logits_of(prepared: Prepared, ids: list[int]) -> np.ndarray:
    """[T, V]; of one length on the device, to compile once: no token sees what comes after it."""
    padded = np.zeros((1, 288), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward()(prepared, padded))[0, : len(ids)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def check_scores(log_probs: np.ndarray, tokens, chosen, top_ids, top) -> None:
    """What is told of tokens [T] is in `log_probs` [T, V]; the 20 most likely are that."""
    at = np.arange(len(tokens))
    np.testing.assert_allclose(chosen, log_probs[at, tokens], atol=1e-5)
    np.testing.assert_allclose(top, log_probs[at[:, None], top_ids], atol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-log_probs, axis=1)[:, :20], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- values


def check_greedy(batch: Batch, golden, rows: tuple[int, int]) -> None:
    prompts = golden.arrays["prompt_ids"].tolist()
    batch.fill({row: Prompt(prompt) for row, prompt in zip(rows, prompts, strict=True)})
    for _ in range(3):
        batch.decode()
    for row, expected in zip(rows, golden.arrays["greedy_ids"], strict=True):
        assert batch.tokens(row)[:24] == expected.tolist()


def test_greedy_tokens_are_those_of_pytorch(golden):
    check_greedy(Batch(prepared_golden(golden.folder.name)), golden, (3, 1))


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_chunks_and_steps_give_what_the_whole_forward_pass_gives(name: str):
    """Hidden states of three chunks, log-probabilities of the prompt, and those of drawn tokens before penalties."""
    prepared = prepared_golden(name)
    batch, size = Batch(prepared), engine.chunk_length()
    settings = Settings(max_new_tokens=40, temperature=1.5, top_k=0, top_p=0.9, seed=2, eos_token_id=(), vocab_size=99)
    prompts = {2: Prompt(LONG, settings), 0: Prompt(SHORT[0], settings)}
    hidden, found = [], []
    for start in range(0, 150, size):
        h_RCD = batch.extend(start, prompts if start == 0 else {2: prompts[2]})
        labels = np.zeros(h_RCD.shape[:2], np.int32)
        labels[0] = (LONG[start + 1 :] + [0] * size)[:size]
        found.append([np.asarray(x)[0] for x in engine.score_chunk(prepared, h_RCD, labels)])
        hidden.append(h_RCD[:1])
    batch.decode()
    batch.decode(3)
    new = batch.tokens(2)
    assert len(new) == 12 and max(new) < 99
    logits = logits_of(prepared, LONG + new)
    by_chunks = jax.jit(lambda prepared, h: prepared.merge().lm_head(h))(prepared, jnp.concatenate(hidden, 1))
    np.testing.assert_allclose(by_chunks[0, :150], logits[:150], atol=3e-5)
    log_probs = log_softmax(logits)
    scores = [np.concatenate(x)[:149] for x in zip(*found, strict=True)]
    check_scores(log_probs[:149], LONG[1:], *scores)
    told = batch.found[2]
    top = np.array([score.top for score in told])
    check_scores(log_probs[149:-1], new, [x.log_prob for x in told], top[..., 0].astype(int), top[..., 1])


def test_settings_are_a_rows_own():
    """Four greedy rows of one batch against numpy, which changes the logits of the whole forward pass."""
    prepared = prepared_golden("rope-tiny")
    one = Settings(max_new_tokens=1, eos_token_id=(), **GREEDY)
    [eos], [likely] = (numpy_greedy(prepared, prompt, one) for prompt in SHORT[2:])
    settings = [
        Settings(max_new_tokens=12, temperature=0.0, repetition_penalty=1.5, eos_token_id=()),
        Settings(
            max_new_tokens=16, temperature=0.0, repetition_penalty=1.0, presence_penalty=1.0, frequency_penalty=1.5,
            eos_token_id=(), logit_bias={7: 8.0, 8: 7.0},
        ),
        Settings(max_new_tokens=8, temperature=0.0, repetition_penalty=1.1, min_tokens=3, eos_token_id=eos),
        Settings(max_new_tokens=9, eos_token_id=(), logit_bias={7: 1.0, likely: -3.0}, **GREEDY),
    ]  # fmt: skip
    batch = Batch(prepared)
    batch.fill({row: Prompt(SHORT[row], settings[row]) for row in (0, 1)})
    batch.fill({row: Prompt(SHORT[row], settings[row]) for row in (2, 3)})
    batch.decode()
    batch.decode()
    plain = Settings(max_new_tokens=16, eos_token_id=(), **GREEDY)
    for row, prompt in enumerate(SHORT):
        expected = numpy_greedy(prepared, prompt, settings[row])
        assert batch.tokens(row) == expected
        assert expected != numpy_greedy(prepared, prompt, plain)[: len(expected)], "the settings do something"
        if row == 1:
            assert expected.count(7) > 1 and expected.count(8) > 1 and len(set(expected)) > 2, "each of the penalties"


def numpy_greedy(prepared: Prepared, prompt: list[int], settings: Settings) -> list[int]:
    settings = settings.check(prepared.config)
    new: list[int] = []
    while len(new) < settings.max_new_tokens and not set(new) & set(settings.eos_token_id):
        logits = logits_of(prepared, prompt + new)[-1].astype(np.float64)
        if len(new) < settings.min_tokens:
            logits[list(settings.eos_token_id)] = -np.inf
        for token, bias in (settings.logit_bias or {}).items():
            logits[token] += bias
        seen, penalty = list({*prompt, *new}), settings.repetition_penalty
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        counts = np.bincount(new, minlength=len(logits))
        logits -= settings.presence_penalty * (counts > 0) + settings.frequency_penalty * counts
        new.append(int(logits.argmax()))
    return new


# --------------------------------------------------------------------------------------------------------- ends of rows


def test_rows_end_at_their_own_eos_limit_or_slots():
    """Of 256 slots 250 are a prompt's; its last token needs none."""
    prepared = prepared_golden("rope-tiny")
    whole = numpy_greedy(prepared, SHORT[1], Settings(max_new_tokens=12, eos_token_id=(), **GREEDY))
    eos = whole[5]
    batch = Batch(prepared)
    batch.fill({0: Prompt(SHORT[1], Settings(eos_token_id=eos, **GREEDY)), 1: Prompt(LONGER)})
    batch.fill({2: Prompt(SHORT[1], Settings(max_new_tokens=1, eos_token_id=(), **GREEDY))})
    assert batch.reasons == [Reason.RUNNING, Reason.RUNNING, Reason.LIMIT, Reason.NO_PROMPT]
    batch.fill({3: Prompt(SHORT[1], Settings(max_new_tokens=10, eos_token_id=(), **GREEDY))})
    batch.decode()
    batch.decode()
    assert batch.reasons == [Reason.EOS, Reason.LIMIT, Reason.LIMIT, Reason.LIMIT]
    assert batch.tokens(0) == whole[: whole.index(eos) + 1]
    assert batch.tokens(1) == numpy_greedy(prepared, LONGER, Settings(max_new_tokens=7, eos_token_id=(), **GREEDY))
    assert batch.tokens(2) == whole[:1] and batch.tokens(3) == whole[:10]
    # The newest token is not in the cache, but for that of a row that is full.
    lengths = [7 + len(batch.tokens(0)) - 1, 256, 7, 7 + 9]
    np.testing.assert_array_equal(batch.decoding.length_B, lengths)


def test_a_row_runs_from_its_last_chunk_until_it_is_cancelled():
    prepared = prepared_golden("rope-tiny")
    batch = Batch(prepared)
    batch.extend(0, {1: Prompt(LONG), 0: Prompt(SHORT[0])})
    batch.decode(3)
    assert batch.reasons == [Reason.RUNNING, *[Reason.NO_PROMPT] * 3] and len(batch.tokens(0)) == 4
    np.testing.assert_array_equal(batch.decoding.length_B, [3 + 3, 64, 0, 0])
    # What pads a chunk was never seen.
    assert set(np.flatnonzero(batch.decoding.seen_BV[0])) == {*SHORT[0], *batch.tokens(0)}
    batch.decode(3, cancel=[0, 1, 3])
    # No row is cancelled that does not run.
    assert batch.reasons == [Reason.CANCELLED, *[Reason.NO_PROMPT] * 3] and len(batch.tokens(0)) == 4
    batch.extend(64, {1: Prompt(LONG)})
    batch.extend({1: 128, 0: 0}, {1: Prompt(LONG), 0: Prompt(SHORT[3])})
    assert batch.reasons[:2] == [Reason.RUNNING] * 2
    batch.decode(2)
    assert [len(batch.tokens(row)) for row in range(4)] == [3, 3, 0, 0]


def test_what_was_chosen_can_be_read_later():
    """The state is used up by the next program, its results are not."""
    prepared = prepared_golden("rope-tiny")
    batch = Batch(prepared)
    first = batch.decoding
    batch.fill({0: Prompt(SHORT[0])})
    assert first.cache.k.is_deleted() and first.seen_BV.is_deleted()
    nothing, decoding, emitted = np.zeros(4, bool), batch.decoding, []
    for _ in range(3):
        before = decoding
        decoding, found = engine.decode(prepared, decoding, 2, nothing)
        emitted.append(found)
        assert before.cache.k.is_deleted()
    before = decoding
    decoding = engine.copy_slots(decoding, 0, 1, 0, engine.chunk_length())
    assert before.cache.k.is_deleted()
    assert [int(x.step_B[0]) for x in emitted] == [3, 5, 7]
    tokens = np.concatenate([np.asarray(x.tokens_BK)[0, :2] for x in emitted]).tolist()
    assert tokens == numpy_greedy(prepared, SHORT[0], Settings(max_new_tokens=7, **GREEDY))[1:]


# ------------------------------------------------------------------------------------------------------------ programs


def test_a_mesh_gives_what_one_device_gives(golden, mesh_of):
    """With a place for every row; tests/infer/test_invariance.py has fewer."""
    name = golden.folder.name
    # data, fsdp, tensor, fsdp_inner, context
    shape = {"alibi-tiny": (1, 2, 2), "rope-tiny": (1, 2, 1, 1, 2)}[name]
    prepared = prepared_golden(name, mesh_of(*shape))
    batch, alone = Batch(prepared, places=4), Batch(prepared_golden(name))
    with jax.transfer_guard("disallow"):
        check_greedy(batch, golden, (2, 1))
    heads = DEFAULT_RULES.spec(None, "batch", "attention_heads", None, None)
    assert batch.decoding.cache.k.sharding.spec == heads
    check_greedy(alone, golden, (2, 1))
    for row in (2, 1):
        assert batch.tokens(row) == alone.tokens(row)
        for one, other in zip(batch.found[row], alone.found[row], strict=True):
            np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
    labels = np.tile(np.array(LONG[1:65], np.int32), (4, 1))
    found = engine.score_chunk(prepared, batch.extend(0, {0: Prompt(LONG), 3: Prompt(LONG)}), labels)
    log_probs = log_softmax(logits_of(prepared_golden(name), LONG[:64]))
    for row in (0, 3):
        check_scores(log_probs, LONG[1:65], *(np.asarray(x)[row] for x in found))


def test_nothing_is_compiled_for_other_prompts():
    """Nor moved but explicitly."""
    batch = Batch(prepared_golden("rope-tiny"))
    programs, rng = engine.programs(batch.prepared.compute), np.random.default_rng(0)

    def use(lengths: list[int], settings: Settings, steps: int) -> list[int]:
        prompts = {row: Prompt(rng.integers(3, 320, n).tolist(), settings, row) for row, n in enumerate(lengths)}
        with jax.transfer_guard("disallow"):
            for row, prompt in prompts.items():
                batch.fill({row: prompt})
                batch.decode(steps, cancel=[1])
            batch.copy(1, 3, steps % 3)
        return [program._cache_size() for program in programs]

    before = use([3, 64, 1], Settings(), 2)
    assert use([200, 65, 7], Settings(temperature=0.0, top_k=0, top_p=1.0, logit_bias={3: 1}), 8) == before
    assert use([63, 128, 250], Settings(temperature=2.0, top_k=100, presence_penalty=1, min_tokens=2), 5) == before


def test_compiler_options(monkeypatch):
    """A TPU's own, unless the default ones are asked for; on a CPU those that keep a row's bits."""
    monkeypatch.setattr(engine, "make_programs", lambda **options: options)
    on_a_cpu = engine.programs(ComputeConfig())
    assert set(on_a_cpu) == {"xla_cpu_experimental_ynn_fusion_type", "xla_allow_excess_precision"}
    monkeypatch.setattr(engine, "platform", lambda: "tpu")
    assert engine.programs(ComputeConfig()) == {}  # the chip is not known
    monkeypatch.setattr(engine, "current_chip", lambda: "v5e")
    assert engine.programs(ComputeConfig()) == compiler_options("v5e", inference=True) != {}
    assert engine.programs(ComputeConfig(compiler_options="default")) == {}


@pytest.mark.parametrize(("kv", "dtype", "size"), [("compute", "float32", 2**32), ("int8", "int8", 2**30 + 2**25)])
def test_full_size_cache(kv, dtype: str, size: int):
    """On a CPU in fp32; int8 with an fp32 scale for each head of a token."""
    cache = jax.eval_shape(lambda: init_cache(BAICHUAN2_7B, ComputeConfig(), 1, 4096, kv))
    assert cache.k.shape == cache.v.shape == (32, 1, 32, 4096, 128) and cache.k.dtype == dtype
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == size


def test_rows_of_no_prompt_hold_only_what_is_asked_for():
    """Counts of tokens take 2 bytes for each of the vocabulary: only where a row may have a penalty for them."""
    prepared = prepared_golden("rope-tiny")
    settings = [Settings().check(prepared.config)] * 2
    empty = engine.allocate(prepared, sampling_of(settings, [0, 1]), slots=128)
    assert empty.counts_BV is None and empty.sampling.bias is None and empty.sampling.top_log_probs is None
    full = engine.allocate(prepared, sampling_of(settings, [0, 1], full=True), slots=128)
    assert full.counts_BV.shape == (2, 320) and full.counts_BV.dtype == jnp.int16
    assert full.reason_B.tolist() == [Reason.NO_PROMPT] * 2
