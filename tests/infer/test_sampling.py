"""Sampling against a brute force in numpy, one row and one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from bc2_jax.config import BAICHUAN2_7B
from bc2_jax.infer import sampling
from bc2_jax.infer.sampling import next_token, sample_tokens
from bc2_jax.infer.settings import Settings, sampling_of

V = 301
CONFIG = dataclasses.replace(BAICHUAN2_7B, vocab_size=V)
TINIEST, LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max
few_candidates, all_candidates = jax.jit(sampling.few_candidates), jax.jit(sampling.all_candidates)
run_next = jax.jit(next_token)
# Eighths, so that comparisons are exact and ties are frequent. Few sizes, so that little is compiled.
LOGITS = (
    st.sampled_from([1, 12, 70])
    .flatmap(lambda n: st.lists(st.integers(-40, 40), min_size=n, max_size=n))
    .map(lambda values: [i / 8 for i in values])
)
TEMPERATURES, SHARES = st.sampled_from([0.1, 0.3, 1.0, 2.0]), st.sampled_from([1.0, 0.97, 0.853, 0.511, 1e-9, 1e-44])


@jax.jit
def draw(logits_BV, keys_B, temperature=1.0, top_k=0, top_p=1.0):
    return sample_tokens(logits_BV, keys_B, temperature=temperature, top_k=top_k, top_p=top_p)


def brute_force(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = {i: np.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total, kept, share = sum(weights.values()), {}, 0.0
    for i in order:
        if kept and top_p < 1 and share / total >= top_p:
            break
        kept[i] = weights[i]
        share += weights[i]
    return {i: w / sum(kept.values()) for i, w in kept.items()}


def probabilities(rows: Sequence[tuple[Sequence[float], float, int, float]]) -> list[list[dict[int, float]]]:
    """Token -> probability of rows (logits, temperature, top_k, top_p), by each function that can serve the row."""
    columns = zip(zip(*rows, strict=True), "ffif", strict=True)
    logits_BV, temperature_B, top_k_B, top_p_B = (np.array(x, dtype) for x, dtype in columns)
    weights_BV = np.asarray(all_candidates(logits_BV, temperature_B, top_k_B, top_p_B, temperature_B > 0))
    ids_BK, weights_BK = map(np.asarray, few_candidates(logits_BV, temperature_B, top_k_B, top_p_B))
    found = []
    for b, (_, _, top_k, _) in enumerate(rows):
        both = [(np.arange(weights_BV.shape[1]), weights_BV[b]), (ids_BK[b], weights_BK[b])]
        found.append([])
        for ids, weights in both if 0 < top_k <= 64 else both[:1]:
            p = np.exp(np.float64(weights))
            found[-1].append({int(i): float(p[at] / p.sum()) for at, i in enumerate(ids) if weights[at] > -np.inf})
    return found


def check_probabilities(got: dict[int, float], expected: dict[int, float]) -> None:
    cut = {i for i in expected if expected[i] < 1e-12}  # what is beyond the last bit of a sum; no token is gained
    assert expected.keys() - cut <= got.keys() <= expected.keys()
    np.testing.assert_allclose([got[i] for i in got], [expected[i] for i in got], rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------- what is drawn from


@given(
    LOGITS, st.lists(st.tuples(TEMPERATURES, st.sampled_from([0, 1, 2, 5, 14, 64, 65, 69]), SHARES),
                     min_size=4, max_size=4),
)  # fmt: skip
def test_candidates_match_brute_force(logits, settings):
    rows = [(logits, *row) for row in settings]
    for both, row in zip(probabilities(rows), rows, strict=True):
        for got in both:
            check_probabilities(got, brute_force(*row))


def test_wide_cuts_match_brute_force():
    """A vocabulary with a prime number of ids, and with many ties (the first half of the rows) or few."""
    rng = np.random.default_rng(0)
    cuts = [(k, p) for k in (0, 65, 100, 1008, 1009, 2**31 - 1) for p in (1.0, 0.999, 0.9, 0.3)] * 2
    grid = np.repeat([1 / 8, 1e-3], len(cuts) // 2)[:, None]
    logits = np.float32(np.round(rng.normal(size=(len(cuts), 1009)) * 2 / grid) * grid)
    rows = [(logits[b].tolist(), 0.9, *cut) for b, cut in enumerate(cuts)]
    for (got,), row in zip(probabilities(rows), rows, strict=True):
        check_probabilities(got, brute_force(*row))
        if row[3] == 1:
            assert len(got) == min(row[2] or 1009, 1009)


def test_ties_go_to_the_smaller_id():
    cuts = [(2, 1, {1, 2}), (3, 0.5, {1, 2}), (0, 0.5, {1, 2}), (0, 1e-9, {1}), (5, 1, {0, 1, 2, 3, 4})]
    found = probabilities([([1.0, 3.0, 3.0, 0.0, 3.0, 0.0], 1.0, k, p) for k, p, _ in cuts])
    for both, (_, _, expected) in zip(found, cuts, strict=True):
        assert all(set(got) == expected for got in both)
    zeros = jnp.array([[-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, 0.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample_tokens(zeros, keys, temperature=None).tolist() == [1, 1]
    for top_k, top_p in ((1, 1.0), (0, 1e-6), (3, 0.3)):
        assert draw(zeros, keys, top_k=top_k, top_p=top_p).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-38, 1e-44])
def test_tiny_temperature_is_greedy_and_never_nan(temperature):
    logits = jnp.float32([[-3.0, 70.0, 69.0, -80.0], [0.0, -1.0, 2.0, 1.0]] * 4)
    keys, top_k = jax.random.split(jax.random.key(3), 8), jnp.int32([0, 0, 3, 3, 0, 0, 70, 70])
    tokens = draw(logits, keys, np.float32(temperature), top_k, jnp.float32([1, 1, 0.9, 0.9] * 2))
    assert tokens.tolist() == [1, 2] * 4


def test_extreme_logits():
    """A row of which nothing may be chosen gives id 0; infinite and the largest numbers are larger than all others."""
    inf = np.inf
    rows = [[-inf] * 5, [-inf, -inf, 1, -inf, -inf], [LARGEST, -LARGEST, -inf, 0, 1], [0, 1, inf, -inf, -LARGEST],
            [-LARGEST, -LARGEST, -inf, -LARGEST, -inf], [0, TINIEST, -TINIEST, 0, 0]]  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 6)
    for top_k, top_p in ((0, 1.0), (0, 0.9), (3, 0.9), (3, 1.0)):
        tokens = draw(jnp.float32(rows), keys, 0.5, top_k, top_p)
        assert tokens[:4].tolist() == [0, 2, 0, 2] and int(tokens[4]) in {0, 1, 3} and 0 <= int(tokens[5]) < 5
    assert sample_tokens(jnp.float32(rows), keys, temperature=None)[:5].tolist() == [0, 2, 0, 2, 0]


@pytest.mark.parametrize(("top_k", "top_p", "size"), [(0, 1, 6), (4, 1, 6), (0, 0.8, 6), (4, 0.9, 6), (70, 0.97, 100)])
def test_frequencies(top_k, top_p, size):
    logits, draws = (np.random.default_rng(size).integers(-8, 16, size) / 8).tolist(), 4000
    expected = brute_force(logits, 0.7, top_k, top_p)
    rows = jnp.broadcast_to(jnp.float32(logits), (draws, size))
    tokens = draw(rows, jax.random.split(jax.random.key(0), draws), 0.7, top_k, top_p)
    counts = np.bincount(tokens, minlength=size)
    assert {int(i) for i in np.flatnonzero(counts)} <= expected.keys() and 1 < len(expected) < 71
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4  # beyond the 99.9 % point


def test_what_no_row_needs_is_not_computed():
    """Outside of conditions there is only the arg-max, and a sort nowhere but in the fixed top-k."""
    B = 2
    arguments = (jnp.zeros((B, V)), jax.random.split(jax.random.key(0), B), jnp.ones(B), jnp.ones(B, int), jnp.ones(B))
    whole = jax.make_jaxpr(lambda x, keys, t, k, p: sample_tokens(x, keys, temperature=t, top_k=k, top_p=p))(*arguments)

    def names(jaxpr, *, inside: bool) -> Iterator[str]:
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            if equation.primitive.name != "cond" or inside:
                for one in jaxprs_in_params(equation.params):
                    yield from names(one, inside=inside)

    outside, everything = set(names(whole.jaxpr, inside=False)), set(names(whole.jaxpr, inside=True))
    costly = {"top_k", "random_bits", "exp", "log", "while", "scan", "div", "sort"}
    assert "argmax" in outside and not outside & costly
    assert everything & costly >= {"top_k", "random_bits", "exp", "div"} and "sort" not in everything


# ----------------------------------------------------------------------------------- rows that share a batch, or don't


ROW = st.builds(
    Settings,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 64, 65, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 0.8]),
    seed=st.integers(0, 2**32 - 1),
    eos_token_id=st.sampled_from([2, (2, 40), ()]),
    vocab_size=st.sampled_from([None, 200]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.sampled_from([None, {3: 2.5, 300: -7.0, 40: 4.0}]),
    min_tokens=st.sampled_from([0, 3]),
)


def make_rows(size: int, seed: int = 0):
    """Logits, seen, counts and steps of `size` rows."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (size, V)) * (rng.random((size, V)) < 0.2)
    seen = (counts > 0) | (rng.random((size, V)) < 0.1)
    return np.float32(rng.normal(size=(size, V)) * 3), seen, np.int16(counts), np.int32(rng.integers(0, 6, size))


@given(st.lists(ROW, min_size=8, max_size=8), st.lists(ROW, min_size=8, max_size=8))
def test_a_row_does_not_depend_on_the_others(one, other):
    rows, settings = make_rows(8), [row.check(CONFIG) for row in one]
    tokens = run_next(*rows, sampling_of(settings, range(8), full=True))
    others = [row.check(CONFIG) for row in other]
    for b in (0, 5):
        mixed = [*others[:b], settings[b], *others[b + 1 :]]
        assert run_next(*rows, sampling_of(mixed, range(8), full=True))[b] == tokens[b]
        two = [settings[b], others[0]]  # in a batch of another size, at another place in it
        changed = [np.stack([x[b], x[0]]) for x in rows]
        assert run_next(*changed, sampling_of(two, [b, 9], full=True))[0] == tokens[b]


def test_a_cut_is_the_same_whichever_rows_need_one():
    logits, temperature = make_rows(6)[0], np.full(6, 0.8, np.float32)
    top_k, top_p = np.int32([0, 0, 70, 300, 70, 301]), np.float32([1, 0.9, 1, 0.5, 0.97, 1])
    together = all_candidates(logits, temperature, top_k, top_p, np.ones(6, bool))
    assert (np.isfinite(together).sum(axis=1) < V).tolist() == [False, True, True, True, True, False]
    for b in range(6):
        alone = all_candidates(logits, temperature, top_k, top_p, np.arange(6) == b)
        np.testing.assert_array_equal(alone[b], together[b])


@given(st.lists(ROW, min_size=8, max_size=8))
def test_what_no_row_uses_may_be_none(settings):
    """The neutral arrays of a server give the bits of arrays that are None."""
    unused = dict(presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, min_tokens=0, vocab_size=None)
    rows = [dataclasses.replace(row, **unused).check(CONFIG) for row in settings]
    logits, seen, counts, step = make_rows(8, 1)
    tokens = run_next(logits, seen, None, step, sampling_of(rows, range(8)))
    np.testing.assert_array_equal(tokens, run_next(logits, seen, counts, step, sampling_of(rows, range(8), full=True)))


def test_rows_on_a_mesh():
    settings = [
        Settings(temperature=b % 3 / 2, top_k=(0, 5, 70, 0)[b % 4], top_p=(1, 0.9)[b % 2], seed=b) for b in range(8)
    ]
    rows = [row.check(CONFIG) for row in settings]
    arguments = (*make_rows(8), sampling_of(rows, range(8), top_log_probs=[None, 0, 3, 20] * 2, full=True))

    def run(logits, seen, counts, step, settings):
        token = next_token(logits, seen, counts, step, settings)
        chosen = sampling.chosen_log_probs(logits, token, settings.log_prob_temperature)
        return token, chosen, sampling.top_log_probs(logits, settings.top_log_probs > 0)

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows_first = jax.sharding.PartitionSpec("rows")
    placed = jax.device_put(arguments, jax.NamedSharding(mesh, rows_first))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(run, in_specs=rows_first, out_specs=rows_first))(*placed)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(run)(*arguments))


def test_keys_follow_from_seed_step_and_place():
    logits, seen, counts, _ = make_rows(4)
    logits = np.broadcast_to(logits[0] / 10, logits.shape)
    base = Settings(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)

    def tokens(seeds, places, step):
        rows = [dataclasses.replace(base, seed=seed).check(CONFIG) for seed in seeds]
        return run_next(logits, seen, counts, np.int32(step), sampling_of(rows, places, full=True)).tolist()

    assert len(set(tokens([7] * 4, [3] * 4, [2] * 4))) == 1
    for varied in (
        tokens([0, 1, 2, 2**32 - 1], [3] * 4, [2] * 4), tokens([7] * 4, range(4), [2] * 4),
        tokens([7] * 4, [3] * 4, range(4)),
    ):  # fmt: skip
        assert len(set(varied)) == 4


# ------------------------------------------------------------------------------------------- changes of single logits


def changed_logits(logits, seen, counts, step, row: Settings) -> list[float]:
    """One row's logits as the settings change them, in float64."""
    changed = []
    for i, x in enumerate(map(float, logits)):
        is_absent = row.vocab_size is not None and i >= row.vocab_size and i not in row.eos_token_id
        if is_absent or (i in row.eos_token_id and step < row.min_tokens):
            changed.append(-np.inf)
            continue
        x += (row.logit_bias or {}).get(i, 0)
        if seen[i]:
            x = x / row.repetition_penalty if x > 0 else x * row.repetition_penalty
        changed.append(x - row.frequency_penalty * counts[i] - row.presence_penalty * (counts[i] > 0))
    return changed


@given(st.lists(ROW, min_size=8, max_size=8), st.integers(0, 1000))
def test_changed_logits_match_brute_force(settings, seed):
    rows = make_rows(8, seed)
    greedy = [dataclasses.replace(row, temperature=0).check(CONFIG) for row in settings]
    expected = [int(np.argmax(changed_logits(*(x[b] for x in rows), row))) for b, row in enumerate(greedy)]
    assert run_next(*rows, sampling_of(greedy, range(8), full=True)).tolist() == expected


def test_min_tokens_and_vocab_size_bound_what_is_drawn():
    logits, seen, counts, _ = make_rows(8)
    logits[:, [2, 40, 290]] += 20
    settings = [
        Settings(temperature=1.5, top_k=k, top_p=p, eos_token_id=[2, 290], vocab_size=200, min_tokens=3)
        for k in (0, 60, 100, 200) for p in (1.0, 0.9)
    ]  # fmt: skip
    arrays = sampling_of([row.check(CONFIG) for row in settings], range(8), full=True)
    early = {int(i) for step in range(3) for i in run_next(logits, seen, counts, np.full(8, step, np.int32), arrays)}
    late = {int(i) for step in (3, 4, 5) for i in run_next(logits, seen, counts, np.full(8, step, np.int32), arrays)}
    assert not early & {2, 290} and max(early) < 200 and 40 in early
    assert late & {2, 290} and late <= {*range(200), 290}


def test_penalties_need_counts():
    row = Settings(presence_penalty=1).check(CONFIG)
    logits, seen, _, step = make_rows(1)
    with pytest.raises(ValueError, match="^counts_BV = None is not valid: presence and frequency penalties need"):
        next_token(logits, seen, None, step, sampling_of([row], [0]))


# -------------------------------------------------------------------------------------------------- log-probabilities


@jax.jit
def scores(logits, token, want, temperature=None):
    return sampling.chosen_log_probs(logits, token, temperature), *sampling.top_log_probs(logits, want)


@pytest.mark.parametrize("size", [1, 7, 20, V])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_log_probs_match_float64(size, scale):
    logits = np.float32(np.random.default_rng(size).normal(size=(4, size)) * scale)
    token, want = np.int32([0, size - 1, size // 2, size // 3]), np.array([True, False, True, True])
    chosen, ids, found = scores(logits, token, want)
    exact = np.float64(logits) - np.float64(logits).max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(chosen, exact[np.arange(4), token], rtol=1e-6, atol=1e-6)
    most = min(20, size)
    for b in (0, 2, 3):
        assert ids[b].tolist() == np.argsort(-logits[b], kind="stable")[:20].tolist() + [-1] * (20 - most)
        np.testing.assert_allclose(found[b, :most], exact[b, ids[b, :most]], rtol=1e-6, atol=1e-6)
        assert (found[b, most:] == -np.inf).all()
    assert not ids[1].any() and not found[1].any()
    assert not any(x.any() for x in scores(logits, token, want & False)[1:])


def test_a_log_prob_has_the_same_bits_in_the_list_and_in_any_batch():
    logits = np.round(make_rows(8)[0] * 8) / 8
    want = np.ones(8, bool)
    first = scores(logits, np.zeros(8, np.int32), want)
    for rank in range(20):
        chosen, ids, found = scores(logits, first[1][:, rank], want)
        np.testing.assert_array_equal(chosen, found[:, rank])
        np.testing.assert_array_equal(ids, first[1])
    half = scores(logits[3:5], first[1][3:5, 19], want[:2])
    np.testing.assert_array_equal(half[0], found[3:5, 19])
    np.testing.assert_array_equal(half[2], found[3:5])


def test_log_probs_at_a_temperature():
    logits, token = make_rows(4)[0], np.int32([1, 5, 9, 300])
    chosen = scores(logits, token, np.zeros(4, bool), np.float32([1, 0.5, 2, 1]))[0]
    expected = jax.nn.log_softmax(logits / np.float32([[1], [0.5], [2], [1]]))[np.arange(4), token]
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)
    assert chosen[0] == scores(logits, token, np.zeros(4, bool))[0][0]
