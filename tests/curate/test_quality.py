"""The model against plain loops, its training, and files that are refused."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.quality import QualityModel, area_under_curve, feature_buckets, mean_weights, train_quality
from bc2_jax.curate.tokens import hash_tokens

TOPICS = {
    "good": ["river", "garden", "quiet", "stone", "morning", "bread"],
    "bad": ["buy", "cheap", "click", "winner", "offer", "now"],
}
COMMON = ["the", "a", "of", "and", "in", "to", "is", "on", "for", "with"]


def documents(kind: str, count: int, seed: int, size: int = 60, share: float = 0.2) -> list[str]:
    rng = random.Random(f"{kind}{seed}")
    return [
        " ".join(rng.choice(TOPICS[kind]) if rng.random() < share else rng.choice(COMMON) for _ in range(size))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> QualityModel:
    return train_quality(documents("good", 100, 0), documents("bad", 140, 0))


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=9), max_size=6))
def test_a_documents_mean_is_over_its_words_and_pairs(texts):
    weights = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    found = mean_weights(weights, hash_tokens([" ".join(words) for words in texts]))

    def weight(*words: str) -> float:
        buckets, _ = feature_buckets(hash_tokens([" ".join(words)]))
        return float(weights[buckets[len(words) if len(words) > 1 else 0]])

    for words, mean in zip(texts, found, strict=True):
        values = [weight(word) for word in words]
        values += [weight(*pair) for pair in zip(words, words[1:], strict=False)]
        assert mean == pytest.approx(sum(values) / len(values) if values else 0)


def test_new_documents_are_told_apart(model):
    good, bad = model.score(documents("good", 60, 1)), model.score(documents("bad", 60, 1))
    assert model.held_out_auc > 0.99 and model.held_out_documents == 24
    assert good.dtype == np.float32 and ((good >= 0) & (good <= 1)).all()
    assert good.mean() > 0.8 and bad.mean() < 0.2
    assert area_under_curve(good, bad) > 0.99
    mixed = [" ".join(pair) for pair in zip(documents("good", 60, 2), documents("bad", 60, 2), strict=True)]
    assert bad.mean() < model.score(mixed).mean() < good.mean()


def test_length_does_not_matter(model):
    short = model.score(documents("good", 200, 3, size=60))
    text = " ".join(documents("good", 200, 3, size=60))
    assert model.score([text])[0] == pytest.approx(np.median(short), abs=0.1)


def test_chance_labels_have_no_auc_to_speak_of():
    texts = documents("good", 400, 5, share=0.5)
    assert 0.3 < train_quality(texts[:200], texts[200:]).held_out_auc < 0.7


def test_training_is_deterministic_and_scores_do_not_depend_on_the_company(model):
    again = train_quality(documents("good", 100, 0), documents("bad", 140, 0))
    np.testing.assert_array_equal(again.weights, model.weights)
    assert dataclasses.replace(again, weights=0) == dataclasses.replace(model, weights=0)
    texts = [*documents("good", 3, 1), "", "！", *documents("bad", 3, 1)]
    scores = model.score(texts)
    np.testing.assert_array_equal(scores, np.concatenate([model.score([text]) for text in texts]))
    np.testing.assert_array_equal(scores, model.score(texts, hash_tokens(texts)))
    assert scores[3] == scores[4] == 0


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8)
)  # fmt: skip
def test_area_under_curve_is_that_of_all_pairs(good, bad):
    wins = [(g > b) + (g == b) / 2 for g in good for b in bad]
    assert area_under_curve(np.array(good), np.array(bad)) == pytest.approx(sum(wins) / len(wins))


def bits(texts) -> np.ndarray:
    """A language model that knows the good topics."""
    known = [sum(word in TOPICS["good"] for word in text.split()) / max(len(text.split()), 1) for text in texts]
    return np.array([3.0 - share if text else math.nan for share, text in zip(known, texts, strict=True)])


def test_bits_a_byte_are_a_second_feature_with_a_learned_weight(tmp_path):
    # Words that tell nothing, so that what is learnt is the language model's opinion.
    good, bad = documents("good", 60, 1, share=0.3), documents("good", 60, 2, share=0.05)
    with_bits = train_quality(good, bad, perplexity=bits)
    assert with_bits.perplexity_slope < 0 and with_bits.held_out_auc > 0.99
    texts = [good[0], bad[0], ""]
    scores = with_bits.score(texts, perplexity=bits)
    assert scores[0] > 0.5 > scores[1] and scores[2] == 0
    unknown = with_bits.score(texts[:1], perplexity=lambda texts: np.full(len(texts), np.nan))
    average = with_bits.score(texts[:1], perplexity=lambda texts: np.full(len(texts), with_bits.perplexity_mean))
    assert unknown == average
    with pytest.raises(ValueError, match="perplexity = None is not valid"):
        with_bits.score(texts)
    with_bits.save(tmp_path / "m.npz")
    np.testing.assert_array_equal(QualityModel.load(tmp_path / "m.npz").score(texts, perplexity=bits), scores)


def test_a_model_without_bits_takes_none(model):
    with pytest.raises(ValueError, match="the model was trained without it"):
        model.score(["a"], perplexity=bits)


def test_a_file_gives_the_model_back_and_has_the_same_bytes(model, tmp_path):
    model.save(tmp_path / "a.npz")
    model.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = QualityModel.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.weights, model.weights)
    assert dataclasses.replace(loaded, weights=0) == dataclasses.replace(model, weights=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


class Harmful:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_files_that_are_no_model_are_refused(model, tmp_path, capsys):
    path = tmp_path / "m.npz"
    model.save(path)
    arrays = dict(np.load(path))
    contents = [
        {**arrays, "format": np.int64(2)},
        {name: value for name, value in arrays.items() if name != "slope"},
        {**arrays, "weights": np.zeros(5, np.float32)},
        {**arrays, "slope": np.array([Harmful()], object)},
        {**arrays, "slope": np.zeros(2)},
    ]
    for content in contents:
        np.savez(path, **content)
        with pytest.raises(ValueError, match="quality model = .* is not valid: "):
            QualityModel.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"", b"text", b"PK\x03\x04 broken", (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="quality model = .* is not valid: "):
            QualityModel.load(path)
    with pytest.raises(ValueError, match="it must be a file"):
        QualityModel.load(tmp_path / "missing.npz")
    assert "ran" not in capsys.readouterr().out


def test_too_few_documents_are_named():
    good = documents("good", 30, 0)
    with pytest.raises(ValueError, match="bad = '19 documents' is not valid: at least 20"):
        train_quality(good, [*good[:19], "", "!"])
