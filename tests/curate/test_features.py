"""Hashed n-grams against a dictionary of words, hidden states against one text at a time."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import ModelConfig
from bc2_jax.convert.pretrained import load_pretrained, save_params
from bc2_jax.curate import features
from bc2_jax.curate.features import (
    STEP,
    DocumentFrequencies,
    EmbeddingConfig,
    HashedNgrams,
    mean_hidden_states,
    unit_rows,
)
from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat, the cat slept",
    "",
    "一个人走在路上 the cat",
    "???",
    "def area(width, height):\n    return width * height\n",
    "one two three four five six seven eight nine ten " * 30,
]
texts_of = st.lists(st.text(alphabet="ab c人山\n", max_size=30), max_size=6)


def grams(text: str) -> tuple[list[int], list[int]]:
    """Hashes of tokens and of pairs of neighbours, token by token."""
    words = re.findall(r"[一-鿿]|[^\W一-鿿]+", text)
    tokens = [hash_tokens([word]).hashes for word in words]
    pairs = [
        hash_ngrams(Tokens(np.concatenate([a, b]), np.array([0, 2])), 2).hashes
        for a, b in zip(tokens, tokens[1:], strict=False)
    ]
    return [int(h[0]) for h in tokens], [int(h[0]) for h in pairs]


def sketch(text: str, config: EmbeddingConfig, weight) -> list[float]:
    sums = [0.0] * config.dim
    for hashes, scale in zip(grams(text), (1, config.bigram_weight), strict=True):
        for h in hashes:
            sums[h % config.dim] += scale * weight(h >> 46) * (1 if h >> 32 & 1 else -1)
    roots = [math.copysign(math.sqrt(abs(x)), x) for x in sums]
    norm = math.sqrt(sum(x * x for x in roots)) or 1
    return [round(x / norm * 2048) / 2048 for x in roots]


@pytest.mark.parametrize("bigram_weight", [0.0, 0.5])
def test_hashed_ngrams_are_weighted_counts(bigram_weight: float):
    config = EmbeddingConfig(dim=64, bigram_weight=bigram_weight)
    frequencies = DocumentFrequencies.of(TEXTS)
    occurs = [{h >> 46 for hashes in grams(text) for h in hashes} for text in TEXTS]

    def inverse_frequency(entry: int) -> float:
        return round(256 * math.log((len(TEXTS) + 1) / (sum(entry in o for o in occurs) + 1))) / 256

    for frequency, weight in ((None, lambda _: 1), (frequencies, inverse_frequency)):
        features = HashedNgrams(config, frequency).sketch(hash_tokens(TEXTS))
        assert features.dtype == np.float16
        np.testing.assert_allclose(features, [sketch(text, config, weight) for text in TEXTS], atol=STEP)
        np.testing.assert_array_equal(np.any(features, axis=1), [bool(grams(text)[0]) for text in TEXTS])


@given(texts_of, texts_of)
def test_a_text_has_its_features_wherever_it_stands(one: list[str], other: list[str]):
    frequencies = DocumentFrequencies.of(other)
    ngrams = HashedNgrams(EmbeddingConfig(dim=64), frequencies)

    def embed(texts: list[str]) -> np.ndarray:
        return ngrams.sketch(hash_tokens(texts))

    together = embed(one + other)
    assert together.shape == (len(one + other), 64)
    for row, text in zip(together, one + other, strict=True):
        np.testing.assert_array_equal(row, embed([text])[0])


@given(texts_of, texts_of)
def test_frequencies_add_up(one: list[str], other: list[str]):
    whole = DocumentFrequencies.of(one + other)
    parts = [DocumentFrequencies.of(one), DocumentFrequencies.of(other)]
    np.testing.assert_array_equal(whole.counts, parts[0].counts + parts[1].counts)
    assert whole.documents == parts[0].documents + parts[1].documents == len(one + other)
    occurs = [{h >> 46 for hashes in grams(text) for h in hashes} for text in one + other]
    assert whole.counts.sum() == sum(map(len, occurs))


def test_common_words_weigh_less():
    texts = [f"the of and {'abcdefghij'[i] * 3} {'klmnopqrst'[i] * 3}" for i in range(10)]
    plain, weighted = (
        HashedNgrams(EmbeddingConfig(), f).sketch(hash_tokens(texts)) for f in (None, DocumentFrequencies.of(texts))
    )
    means = [((f.astype(np.float32) @ f.T.astype(np.float32)).sum() - 10) / 90 for f in (plain, weighted)]
    assert means[0] > 0.4 and abs(means[1]) < 0.05


def test_an_edited_copy_is_near_and_another_text_is_not(modules: list[str]):
    documents = [module[i : i + 3000] for module in modules for i in range(0, 12_000, 3000)]
    rng = np.random.default_rng(0)
    copies = []
    for text in documents:
        words = re.findall(r"\w+|\W+", text)
        for i in np.flatnonzero(rng.random(len(words)) < 0.06):
            words[i] = "edited" if words[i][0].isalnum() else words[i]
        copies.append("".join(words))
    embed = HashedNgrams(EmbeddingConfig(), DocumentFrequencies.of(documents))
    features = [embed.sketch(hash_tokens(texts)).astype(np.float32) for texts in (documents, copies)]
    cosines = features[0] @ features[1].T
    others = cosines[~np.eye(len(documents), dtype=bool)]
    assert np.diag(cosines).min() > 0.8
    assert others.max() < 0.75 and np.median(others) < 0.3


@given(st.integers(0, 2**32 - 1), st.integers(1, 600))
def test_cosines_are_exact_in_any_order(seed: int, dim: int):
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng.standard_normal((2, dim)) ** 3)
    units = (rows.astype(np.float64) / STEP).astype(np.int64)
    assert np.array_equal(units * STEP, rows)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=STEP * math.sqrt(dim))
    products = rows[0].astype(np.float32) * rows[1].astype(np.float32)
    exact = int(units[0] @ units[1]) * STEP**2
    for order in (np.arange(dim), rng.permutation(dim)):
        assert float(np.cumsum(products[order], dtype=np.float32)[-1]) == exact


def test_unit_rows_keep_zero():
    assert not unit_rows(np.zeros((2, 3))).any()


@pytest.mark.parametrize(
    "wrong", [{"dim": 100}, {"dim": 32}, {"bigram_weight": -1.0}, {"bigram_weight": float("nan")}, {"max_tokens": 8}]
)
def test_wrong_config(wrong: dict):
    (field,) = wrong
    with pytest.raises(ValueError, match=f"embedding.{field} = .* is not valid: it must be"):
        EmbeddingConfig(**wrong)


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=tokenizer.vocab_size, position_embedding="alibi",
    )  # fmt: skip
    params = nnx.to_pure_dict(nnx.split(Baichuan2(config, rngs=nnx.Rngs(0)))[1])
    path = tmp_path_factory.mktemp("embedding") / "model"
    save_params(params, config, path, tokenizer.path)
    return path


def test_hidden_states_are_means_over_the_first_tokens(
    checkpoint: Path, tokenizer: Tokenizer, modules: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features, "_TOKENS_PER_BATCH", 160)
    texts = ["", TEXTS[2], modules[1][:5000], *(module[:900] for module in modules)]
    means = mean_hidden_states(texts, EmbeddingConfig(model=str(checkpoint), max_tokens=80, dtype="float32"))
    model = load_pretrained(checkpoint)
    for text, mean in zip(texts, means, strict=True):
        ids = tokenizer.encode(text)[:80]
        expected = np.zeros(32)
        if ids:
            expected = np.asarray(model.hidden_states(jnp.array([ids]))[0]).mean(axis=0)
        np.testing.assert_allclose(mean, expected, atol=1e-5)
    empty = mean_hidden_states([], EmbeddingConfig(model=str(checkpoint)))
    assert means.dtype == np.float32 and empty.shape == (0, 32)


def test_a_model_without_a_tokenizer(tmp_path: Path):
    golden = Path(__file__).parents[1] / "golden" / "rope-tiny"
    with pytest.raises(FileNotFoundError, match="has no tokenizer.model"):
        mean_hidden_states(["text"], EmbeddingConfig(model=str(golden)))
    with pytest.raises((FileNotFoundError, ValueError)):
        mean_hidden_states(["text"], EmbeddingConfig(model=str(tmp_path / "nothing")))


def test_batches_have_few_shapes():
    lengths = [0, 1, 32, 33, 64, 65, 101, 100]
    batches = list(features._batches([[7] * length for length in lengths], 32, 100, lambda length: 64 // length or 1))
    assert [(list(documents), ids.shape) for documents, ids, _ in batches] == [
        ([1, 2], (2, 32)), ([3], (1, 64)), ([4], (1, 64)), ([5], (1, 100)), ([7], (1, 100)),
    ]  # fmt: skip
    for documents, ids, segments in batches:
        assert np.array_equal(ids, 7 * segments)
        assert segments.sum(axis=1).tolist() == [lengths[document] for document in documents]
