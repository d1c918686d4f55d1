"""Generation: PyTorch's greedy tokens, meshes, stopping, what is told of continuations, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B
from bc2_jax.infer import engine
from bc2_jax.infer.generate import bucket, cache_slots, continue_prompts, generate
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import Baichuan2
from tests.convert.models import GOLDEN
from tests.infer.batch import GREEDY, golden_model, small_model

PROMPTS = [[5, 6, 7], [11, 300, 42, 9, 9, 17, 250], [3]]


@pytest.fixture(scope="module")
def small() -> Baichuan2:
    return small_model()


# -------------------------------------------------------------------------------------------------------------- values


def test_greedy_tokens_are_those_of_pytorch():
    """Of 13B's architecture; tests/infer/test_refill.py has 7B's, tests/infer/test_engine.py both."""
    expected = np.load(GOLDEN / "alibi-tiny" / "golden.npz")
    tokens = generate(golden_model("alibi-tiny"), expected["prompt_ids"].tolist(), max_new_tokens=24, **GREEDY)
    np.testing.assert_array_equal(tokens, expected["greedy_ids"])


def test_batch_equals_each_prompt_alone(small):
    together = generate(small, PROMPTS, max_new_tokens=20, **GREEDY)
    assert together == [generate(small, [prompt], max_new_tokens=20, **GREEDY)[0] for prompt in PROMPTS]
    assert [len(tokens) for tokens in together] == [20] * 3


def test_a_mesh_does_not_change_the_draws(small, mesh_of):
    """Three prompts, which do not divide by data * fsdp = 2."""
    options = dict(max_new_tokens=20, temperature=1.5, top_k=40, seed=3)
    assert generate(small_model(mesh_of(1, 2, 2)), PROMPTS, **options) == generate(small, PROMPTS, **options)


# ------------------------------------------------------------------------------------------------ stopping, streaming


def test_stops_at_eos(small):
    full = generate(small, PROMPTS, max_new_tokens=20, **GREEDY)
    eos = full[0][4]
    cut = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in full]
    assert generate(small, PROMPTS, max_new_tokens=20, eos_token_id=eos, **GREEDY) == cut
    first = full[0][0]
    assert generate(small, PROMPTS[:1], max_new_tokens=20, eos_token_id=first, **GREEDY) == [[]]


def test_loop_ends_when_all_have_stopped(small, monkeypatch):
    eos = generate(small, PROMPTS[:1], max_new_tokens=5, eos_token_id=(), **GREEDY)[0][4]
    states, decode = [], engine.decode
    monkeypatch.setattr(engine, "decode", lambda *a, **k: states.append(decode(*a, **k)) or states[-1])
    generate(small, PROMPTS[:1], max_new_tokens=100, eos_token_id=eos, **GREEDY)
    # The host learns of the end while the next program is on its way.
    assert len(states) <= 2 and int(states[-1][1].step_B[0]) <= 5


def test_continuations_say_what_is_known(small):
    """Every token with its log-probability, the eos kept, and why each prompt ended."""
    full = generate(small, PROMPTS, max_new_tokens=20, **GREEDY)
    eos = full[0][4]
    settings = Settings(max_new_tokens=20, eos_token_id=eos, **GREEDY)
    found = continue_prompts(small, PROMPTS, settings, log_probs=True)
    for tokens, c in zip(full, found, strict=True):
        assert c.tokens == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
        assert c.reason == ("eos" if eos in tokens else "length")
        assert len(c.log_probs) == len(c.tokens)
    assert continue_prompts(small, PROMPTS[:1], settings)[0].log_probs is None


def test_log_probs_are_of_the_logits_before_sampling(small):
    """The penalty, the temperature and the cuts change the draw, not what is said of it."""
    settings = Settings(max_new_tokens=12, temperature=2.0, top_k=8, top_p=0.9, repetition_penalty=1.5, seed=4)
    found = continue_prompts(small, PROMPTS, settings, log_probs=True)[0]
    logits = jax.jit(lambda ids: small(ids))(jnp.array([[*PROMPTS[0], *found.tokens]]))[0, len(PROMPTS[0]) - 1 : -1]
    expected = jax.nn.log_softmax(logits)[jnp.arange(len(found.tokens)), jnp.array(found.tokens)]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)


def test_prepared_model_gives_the_same_tokens(small):
    options = dict(max_new_tokens=20, temperature=1.0, top_k=0)
    expected = generate(small, [[5, 6, 7], [3]], **options)
    prepared = engine.prepare(small)
    assert [generate(m, [[5, 6, 7], [3]], **options) for m in (prepared, prepared, small)] == [expected] * 3


@pytest.mark.parametrize("options", [GREEDY, dict(temperature=1.0, top_k=0, top_p=0.9)], ids=["greedy", "sampled"])
def test_on_token_gives_the_same_tokens(small, options):
    eos = generate(small, PROMPTS, max_new_tokens=20, **options)[0][4]
    steps: list[list[int | None]] = []

    def on_token(step: int, tokens: list[int | None]) -> None:
        assert step == len(steps)
        steps.append(tokens)

    options = {**options, "max_new_tokens": 20, "eos_token_id": eos}
    tokens = generate(small, PROMPTS, on_token=on_token, **options)
    assert tokens == generate(small, PROMPTS, **options)
    assert tokens == [[t for t in column if t is not None] for column in zip(*steps, strict=True)]
    assert len(steps) == max(map(len, tokens))


def test_any_of_several_ids_ends_a_row(small):
    full = generate(small, PROMPTS, max_new_tokens=20, **GREEDY)
    ends = [full[0][7], full[1][3]]
    cut = [tokens[: min([*map(tokens.index, set(ends) & set(tokens)), 20])] for tokens in full]
    assert generate(small, PROMPTS, max_new_tokens=20, eos_token_id=ends, **GREEDY) == cut
    assert generate(small, PROMPTS, max_new_tokens=20, eos_token_id=np.array(ends), **GREEDY) == cut
    never = generate(small, PROMPTS, max_new_tokens=20, eos_token_id=[], **GREEDY)
    assert never == full and all(len(tokens) == 20 for tokens in never)


@pytest.mark.parametrize("answer", [True, [False, True, False], np.array([True, False, True])], ids=repr)
def test_on_token_stops(small, answer):
    options = dict(max_new_tokens=9, eos_token_id=[], **GREEDY)
    full = generate(small, PROMPTS, **options)
    settings = Settings(**options)
    found = continue_prompts(small, PROMPTS, settings, on_token=lambda step, tokens: answer if step == 3 else None)
    stopped = [answer] * 3 if answer is True else list(answer)
    assert [c.tokens for c in found] == [t[:4] if stop else t for t, stop in zip(full, stopped, strict=True)]
    assert [c.reason for c in found] == ["stopped" if stop else "length" for stop in stopped]


def test_on_token_does_not_stop_what_has_ended(small):
    (eos,) = generate(small, [[5, 6, 7]], max_new_tokens=1, eos_token_id=[], **GREEDY)[0]
    settings = Settings(max_new_tokens=9, eos_token_id=eos, **GREEDY)
    found = continue_prompts(small, [[5, 6, 7], [3]], settings, on_token=lambda step, tokens: step == 2)
    assert (found[0].tokens, found[0].reason) == ([eos], "eos")
    assert (len(found[1].tokens), found[1].reason) == (3, "stopped")


@pytest.mark.parametrize("answer", ["stop", 1, [True], [True, 1], {}])
def test_on_token_must_answer_with_bools(small, answer):
    with pytest.raises(ValueError, match="it must return None, a bool, or 2 bools, one a prompt"):
        generate(small, [[5], [6]], max_new_tokens=4, on_token=lambda step, tokens: answer)


# ------------------------------------------------------------------------------------------ ids without a piece


@pytest.mark.parametrize(
    "options", [GREEDY, dict(temperature=1.5, top_k=0, top_p=1.0), dict(temperature=1.5, top_k=60)]
)
def test_absent_ids_are_never_chosen(small, options):
    """Of 512 ids 7 have a piece, and another one ends a row, beside one of these."""
    seen: set[int] = set()
    for seed in range(3):
        settings = Settings(max_new_tokens=20, eos_token_id=[2, 40], vocab_size=7, seed=seed, **options)
        for c in continue_prompts(small, [[5], [3, 1], [60]], settings):
            seen |= set(c.tokens)
            assert c.reason == ("eos" if c.tokens[-1] in (2, 40) else "length")
    assert seen <= {*range(7), 40}


def test_a_vocabulary_that_is_whole_changes_nothing(small):
    options = dict(max_new_tokens=20, temperature=1.0, top_k=0)
    expected = generate(small, [[5, 6, 7]], **options)
    for size in (512, 1000):
        assert generate(small, [[5, 6, 7]], vocab_size=size, **options) == expected


# ----------------------------------------------------------------------------------------------------------- sampling


def test_seeds(small):
    def draw(seed, prompts):
        return generate(small, prompts, max_new_tokens=30, temperature=1.0, top_k=0, seed=seed)

    prompts = [[5, 6], [7, 8, 9], [5, 6]]
    first = draw(0, prompts)
    assert draw(0, prompts) == first
    assert draw(1, prompts) != first
    assert first[0] != first[2]  # equal prompts do not share their draws
    assert draw(0, prompts[:2]) == first[:2]


def test_no_recompilation(small):
    def count() -> list[int]:
        return [program._cache_size() for program in engine.programs(small.compute)]

    generate(small, [[5] * 10, [6], [7]], max_new_tokens=20)
    before = count()
    again = nnx.merge(*nnx.split(small))
    generate(
        again, [[5] * 64, [6] * 3, [7]], max_new_tokens=55, temperature=0.9, top_p=0.5, repetition_penalty=1.2, seed=7
    )
    generate(small, [[5], [6], [7]], max_new_tokens=3, eos_token_id=9, on_token=lambda step, tokens: None)
    generate(small, [[5], [6], [7]], max_new_tokens=3, eos_token_id=[9, 10, 11])
    assert count() == before
    generate(small, [[5], [6], [7]], max_new_tokens=3, vocab_size=20)
    before = count()
    generate(small, [[5], [6], [7]], max_new_tokens=3, vocab_size=30, eos_token_id=[40, 50])
    assert count() == before


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[512]], {}, r"prompts\[0\] has token id 512: it must be a whole number in 0\.\.511"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 116], {"max_new_tokens": 13}, "116 tokens, which with max_new_tokens = 13 is more than .* = 128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"temperature": -0.1}, "temperature = -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan"),
        ([[1]], {"top_k": -1}, "top_k = -1"),
        ([[1]], {"top_p": 0.0}, "top_p = 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p = 1.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ([[1]], {"eos_token_id": 512}, "eos_token_id = 512"),
        ([[1]], {"eos_token_id": [2, 512]}, r"eos_token_id = \[2, 512\]"),
        ([[1]], {"eos_token_id": list(range(17))}, "a list of at most 16 ids"),
        ([[1]], {"seed": 2**32}, r"seed = 4294967296 .* 0 to 2\^32 - 1"),
        ([[1]], {"seed": 2**63}, "seed = 9223372036854775808"),
        ([[1]], {"seed": -1}, "seed = -1"),
        ([[1]], {"vocab_size": 0}, "vocab_size = 0"),
        ([[1]], {"temperature": 10**400}, "temperature = 1000"),
        ([[1]], {"repetition_penalty": 1e-50}, "repetition_penalty = 1e-50"),
        (["abc"], {}, r"prompts\[0\] = 'abc' is text: it must be token ids"),
        ("abc", {}, "prompts = 'abc' is not valid: it must be a list of prompts"),
        ([1, 2], {}, r"prompts\[0\] = 1 is one id: prompts must be a list of prompts"),
        (np.array([1, 2]), {}, r"prompts\[0\] = .*1.* is one id"),
        (5, {}, "prompts = 5 is not valid"),
        ({"a": [1]}, {}, "prompts = {'a': .*} is not valid"),
        ([None], {}, r"prompts\[0\] = None is not valid: it must be a list of token ids"),
        ([[1.0]], {}, r"prompts\[0\] has token id 1\.0"),
        ([[1], [True]], {}, r"prompts\[1\] has token id True"),
        ([["a"]], {}, r"prompts\[0\] has token id 'a'"),
        ([[[1]]], {}, r"prompts\[0\] has token id \[1\]"),
        (np.ones((2, 3)), {}, r"prompts\[0\] has token id 1\.0"),
        (np.ones((2, 3, 4), int), {}, r"prompts\[0\] = array.* is not valid"),
    ],
)
def test_errors(small, prompts, options, message):
    with pytest.raises(ValueError, match=message) as found:
        generate(small, prompts, **{"max_new_tokens": 8, **options})
    assert str(found.value).endswith(".") and "\n" not in str(found.value)


NUMBERS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "eos_token_id",
    "vocab_size",
)


@given(
    st.sampled_from(NUMBERS),
    st.one_of(
        st.booleans(), st.text(max_size=3), st.binary(max_size=2), st.complex_numbers(), st.just({}), st.just([1.5])
    ),
)
def test_settings_of_another_type_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} = .* is not valid: it must be .*\\.$"):
        Settings(**{name: value}).check(BAICHUAN2_7B)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed", "eos_token_id", "vocab_size"])
@pytest.mark.parametrize("value", [1.5, 2.0, float("nan"), np.float32(3)])
def test_whole_numbers_are_whole(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        Settings(**{name: value}).check(BAICHUAN2_7B)


def test_numbers_and_prompts_of_numpy_and_jax_are_numbers(small):
    plain = generate(small, [[5, 6, 7]], max_new_tokens=4, temperature=1.0, top_k=5, seed=3)
    for array in (np.array, jnp.array):
        options = {"max_new_tokens": array(4), "temperature": array(1.0), "top_k": array(5), "seed": array(3)}
        for prompts in (array([[5, 6, 7]]), [array([5, 6, 7])], ((5, 6, 7),)):
            assert generate(small, prompts, **options) == plain
    assert generate(small, iter([[5, 6, 7]]), max_new_tokens=np.int64(4), temperature=1, top_k=5, seed=3) == plain


def test_what_is_no_model_is_said():
    with pytest.raises(ValueError, match="model is a str: it must be what load_pretrained"):
        generate("Baichuan2-7B-Base", [[1]])


def test_longest_prompt_fits(small):
    (tokens,) = generate(small, [[5] * 125], max_new_tokens=3, eos_token_id=(), **GREEDY)
    assert len(tokens) == 3


def test_bucket():
    lengths = (1, 64, 65, 128, 129, 256, 257, 512, 513, 4096)
    assert [bucket(n) for n in lengths] == [64, 64, 128, 128, 256, 256, 512, 512, 768, 4096]
    assert [cache_slots(n) for n in (1, 65, 129)] == [128, 128, 256]
