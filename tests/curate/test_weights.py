"""Sampling weights: normalised, bounded, and monotone in what they depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate import weights as weights_module
from bc2_jax.curate.weights import (
    Weigher,
    WeightsConfig,
    add_counts,
    count_factors,
    count_scores,
    scaled_weights,
)

NAMES = ["books", "code", "web"]


def sampling_weights(cluster_sizes, clusters, scores, sources, config=None, *, languages=None, sizes=None):
    """The weights of a corpus in one part. Without `languages` it has one language, without `sizes` all are equal."""
    config = config or WeightsConfig()
    languages = np.array([""] * len(clusters) if languages is None else languages)
    sizes = np.ones(len(clusters), np.int64) if sizes is None else sizes
    sources = np.array(sources)
    weigher = Weigher(
        count_scores(languages, sources, scores, sizes, len(clusters)), cluster_sizes, len(clusters), config
    )
    factors = weigher.factors(clusters, scores, sources, languages)
    return scaled_weights(languages, factors, weigher.scales(count_factors(languages, factors, sizes)), config)


@st.composite
def corpora(draw: st.DrawFn) -> dict:
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    clusters = rng.integers(0, draw(st.integers(1, 8)), n)
    scores = rng.standard_normal(n) if draw(st.booleans()) else rng.integers(0, 3, n).astype(float)
    sizes = rng.integers(1, 10_000, n)
    cluster_sizes = np.bincount(clusters, weights=sizes, minlength=9).astype(np.int64)
    sources = [NAMES[i] for i in rng.integers(0, 3, n)]
    languages = [["zh", "en", "code"][i] for i in rng.integers(0, draw(st.integers(1, 3)), n)]
    return dict(
        cluster_sizes=cluster_sizes, clusters=clusters, scores=scores, sources=sources, sizes=sizes, languages=languages
    )


@st.composite
def configs(draw: st.DrawFn, **fixed) -> WeightsConfig:
    fields = dict(
        cluster_exponent=draw(st.floats(0, 2)),
        score_strength=draw(st.floats(0, 3)),
        least=draw(st.floats(0.01, 1)),
        most=draw(st.floats(1, 10)),
    )
    return WeightsConfig(**(fields | fixed))


@given(corpora(), configs())
def test_normalised_and_bounded(corpus: dict, config: WeightsConfig):
    weights = sampling_weights(config=config, **corpus)
    assert weights.dtype == np.float32 and (weights > 0).all()
    assert weights.min() >= config.least * (1 - 1e-6) and weights.max() <= config.most * (1 + 1e-6)
    mean = (weights.astype(np.float64) * corpus["sizes"]).sum() / corpus["sizes"].sum()
    assert mean == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(weights, sampling_weights(config=config, **corpus))


@given(corpora(), configs())
def test_monotone(corpus: dict, config: WeightsConfig):
    """In a language, a document with at least the score and at most the cluster size has at least the weight."""
    weights = sampling_weights(config=config, **corpus)
    own = corpus["cluster_sizes"][corpus["clusters"]]
    languages = np.array(corpus["languages"])
    for i in range(len(weights)):
        better = (corpus["scores"] >= corpus["scores"][i]) & (own <= own[i]) & (languages == languages[i])
        assert (weights[better] >= weights[i]).all()


def shares(weights: np.ndarray, corpus: dict) -> dict[str, float]:
    """Share of the sampled bytes by language."""
    read = weights.astype(np.float64) * corpus["sizes"]
    languages = np.array(corpus["languages"])
    return {language: read[languages == language].sum() / read.sum() for language in set(corpus["languages"])}


@given(corpora(), configs(), st.integers(0, 39), st.floats(-9, 9), st.floats(0.1, 9))
def test_languages_keep_their_shares(corpus: dict, config: WeightsConfig, place: int, move: float, spread: float):
    """Scores of two languages have no common scale, so shifting one language's scores changes nothing."""
    weights = sampling_weights(config=config, **corpus)
    assert shares(weights, corpus) == pytest.approx(shares(np.ones(len(weights)), corpus), abs=1e-5)
    here = np.array(corpus["languages"]) == corpus["languages"][place % len(weights)]
    scores = np.where(here, corpus["scores"] * spread + move, corpus["scores"])
    assert len(np.unique(scores[here])) < len(np.unique(corpus["scores"][here])) or np.allclose(
        sampling_weights(config=config, **(corpus | {"scores": scores})), weights, rtol=1e-5
    )  # (rounding may make two scores equal)


def test_the_share_of_a_language_moves_when_asked():
    n = 300
    corpus = dict(
        cluster_sizes=np.array([n]), clusters=np.zeros(n, int), scores=np.arange(float(n)), sources=["web"] * n,
        sizes=np.ones(n), languages=["zh", "en", "en"] * (n // 3),
    )  # fmt: skip
    config = WeightsConfig(languages={"zh": 2.0}, least=0.01, most=100)
    assert shares(sampling_weights(config=config, **corpus), corpus) == pytest.approx({"zh": 0.5, "en": 0.5}, abs=1e-6)
    corpus["sources"] = ["books", "web", "web"] * (n // 3)
    config = WeightsConfig(sources={"books": 2.0}, least=0.01, most=100)
    assert shares(sampling_weights(config=config, **corpus), corpus) == pytest.approx({"zh": 0.5, "en": 0.5}, abs=1e-6)


@given(corpora(), st.floats(1, 3))
def test_a_source_is_up_sampled(corpus: dict, factor: float):
    source = corpus["sources"][0]
    mine = np.array(corpus["sources"]) == source

    def share(factor: float) -> float:
        weights = sampling_weights(config=WeightsConfig(sources={source: factor}), **corpus) * corpus["sizes"]
        return weights[mine].sum() / weights.sum()

    assert share(factor) >= share(1) - 1e-6


def in_parts(corpus: dict, config: WeightsConfig, parts: int) -> np.ndarray:
    """The weights as tasks compute them, each with a part of the corpus."""
    names = ("languages", "sources", "scores", "sizes", "clusters")
    split = [dict(zip(names, part, strict=True)) for part in zip(
        *(np.array_split(np.array(corpus[name]), parts) for name in names), strict=True
    )]  # fmt: skip
    n = len(corpus["clusters"])
    scored = [count_scores(p["languages"], p["sources"], p["scores"], p["sizes"], n) for p in split]
    weigher = Weigher(add_counts(scored), corpus["cluster_sizes"], n, config)
    factors = [weigher.factors(p["clusters"], p["scores"], p["sources"], p["languages"]) for p in split]
    counted = [count_factors(p["languages"], f, p["sizes"]) for p, f in zip(split, factors, strict=True)]
    scales = weigher.scales(add_counts(counted))
    return np.concatenate(
        [scaled_weights(p["languages"], f, scales, config) for p, f in zip(split, factors, strict=True)]
    )


@pytest.mark.parametrize("exact", [0, 1 << 22])
@given(corpora(), configs(), st.integers(1, 50))
def test_parts_of_a_corpus_give_the_bits_of_the_whole(exact: int, corpus: dict, config: WeightsConfig, parts: int):
    """Also parts without documents, and also where scores are counted coarsely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "_EXACT", exact)
        np.testing.assert_array_equal(in_parts(corpus, config, parts), sampling_weights(config=config, **corpus))


@given(corpora(), configs())
def test_a_large_corpus_is_counted_coarsely(corpus: dict, config: WeightsConfig):
    """Where scores differ in their first 15 binary digits, weights change in their last digits alone."""
    corpus["scores"] = np.round(corpus["scores"] * 64) / 64
    exact = sampling_weights(config=config, **corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "_EXACT", 0)
        np.testing.assert_allclose(sampling_weights(config=config, **corpus), exact, rtol=3e-4)
        test_normalised_and_bounded.hypothesis.inner_test(corpus, config)
        test_monotone.hypothesis.inner_test(corpus, config)


@pytest.mark.parametrize("corpus, rows", [(1 << 22, 2), ((1 << 22) + 1, 1)])
def test_scores_that_are_nearly_equal_count_as_equal_in_a_large_corpus(corpus: int, rows: int):
    counted = count_scores(*np.array([["en"] * 2, ["web"] * 2]), np.array([1, 1 + 2**-20]), np.array([3, 4]), corpus)
    assert counted.num_rows == rows
    assert (sum(counted["documents"].to_pylist()), sum(counted["size"].to_pylist())) == (2, 7)


def test_formula():
    """Nothing is clipped: ratios are those of the docstring."""
    config = WeightsConfig(cluster_exponent=0.5, score_strength=0.3, sources={"books": 1.5}, least=1e-3, most=1e3)
    cluster_sizes = np.array([100, 0, 400, 1600])
    clusters, scores = np.array([0, 2, 3, 0, 0]), np.array([0.1, 0.9, 0.9, -5.0, 7.0])
    sources = ["web", "web", "web", "books", "web"]
    weights = sampling_weights(cluster_sizes, clusters, scores, sources, config)
    ranks = np.array([1, 2.5, 2.5, 0, 4]) / 4
    expected = np.array([2, 1, 0.5, 2 * 1.5, 2]) * np.exp(0.3 * (2 * ranks - 1))
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-6)


def test_without_strength_all_weigh_one():
    config = WeightsConfig(cluster_exponent=0.0, score_strength=0.0)
    weights = sampling_weights(np.array([3, 9]), np.array([0, 1, 1]), np.arange(3.0), ["a", "b", "b"], config)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cluster_exponent": -0.1}, {"score_strength": math.nan}, {"least": 0.0}, {"least": 1.5}, {"most": 0.5},
        {"sources": {"web": 0.0}}, {"languages": {"zh": -1.0}},
    ],
)  # fmt: skip
def test_wrong_config(wrong: dict):
    (field,) = wrong
    with pytest.raises(ValueError, match=rf"weights.{field}.* = .* is not valid: it must be"):
        WeightsConfig(**wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clusters": np.array([0, 2])}, r"clusters = \[2\] is not valid: they must be in 0..1"),
        ({"clusters": np.array([0, -1])}, r"clusters = \[-1\] is not valid"),
        ({"cluster_sizes": np.array([1, 0])}, r"clusters = \[1\] is not valid: .* have a size above 0"),
        ({"scores": np.array([0.5, np.nan])}, "scores = .*nan.* is not valid: they must be finite"),
        ({"scores": np.array([0.5])}, r"scores = \(1,\) is not valid: there are 2 documents"),
        ({"sizes": np.array([0, 0])}, "sizes = 0 is not valid"),
        ({"sizes": np.array([1, -2])}, r"sizes = \[-2\] is not valid"),
        ({"languages": ["zh"]}, r"languages = \(1,\) is not valid: there are 2 documents"),
        (
            {"config": WeightsConfig(languages={"zh": 2.0}), "languages": ["en", "ja"]},
            "'zh' .*: languages .* are en, ja",
        ),
        ({"config": WeightsConfig(sources={"bokks": 2.0})}, "'bokks' is not valid: sources .* are books, web"),
    ],
)
def test_wrong_input(change: dict, message: str):
    good = dict(
        cluster_sizes=np.array([1, 1]), clusters=np.array([0, 1]), scores=np.array([0.1, 0.2]), sources=["books", "web"]
    )
    with pytest.raises(ValueError, match=message):
        sampling_weights(**(good | change))
