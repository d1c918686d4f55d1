import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.packing import split_of
from bc2_jax.data.tokenizer_sample import SampleDrawer, TokenizerSample

Documents = list[tuple[str, str, float]]
TEXTS = st.text(st.sampled_from("ab汉😀"), max_size=12)
DOCUMENTS = st.lists(
    st.tuples(TEXTS, st.sampled_from(["zh", "en", "code"]), st.sampled_from([0.0, 0.5, 1.0, 3.0])), max_size=30
)


def draw(documents: Documents, sample_bytes: int, **options: object) -> TokenizerSample:
    drawer = SampleDrawer(sample_bytes, **{"held_out_fraction": 0.3, **options})
    for document in documents:
        drawer.add(*document)
    return drawer.finish()


def key(text: str, weight: float) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"tokenizer sample").digest()
    return (int.from_bytes(digest, "little") + 1) / 2**64 / weight


def expected(documents: Documents, budget: int) -> str:
    """The texts by key, joined, cut at the budget: all of it sorted, where the drawer keeps a heap."""
    candidates = [
        (key(text, w), language, text) for text, language, w in documents if w and split_of(text, 0.3) != "validation"
    ]
    content = "".join(text for _, _, text in sorted(candidates, key=lambda c: (c[0], c[1], c[2])[:1])).encode()
    return content[:budget].decode(errors="ignore")


@given(DOCUMENTS, st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_sample_is_the_smallest_keys_in_any_order(documents: Documents, budget: int, rng: random.Random) -> None:
    documents = [("first", "en", 1.0), *{document[0]: document for document in documents}.values()]
    sample = draw(documents, budget)
    assert "".join(sample.texts) == expected(documents, budget)
    rng.shuffle(documents)
    assert draw(documents, budget) == sample


@given(DOCUMENTS, st.integers(1, 60))
def test_held_out_documents_are_never_drawn_and_all_are_counted(documents: Documents, budget: int) -> None:
    documents = [("first", "en", 1.0), *documents]
    sample = draw(documents, budget)
    held_out = {text for texts in sample.held_out.values() for text in texts}
    assert held_out == {text for text, _, _ in documents if text and (split_of(text, 0.3) == "validation")}
    whole = [text for text, _, _ in documents if text not in held_out]
    for text in sample.texts[:-1]:  # the last may be the beginning of a document
        assert text in whole
    for language, count in sample.counts.items():
        here = [(text, weight) for text, name, weight in documents if name == language]
        assert (count.documents, count.bytes) == (len(here), sum(len(text.encode()) for text, _ in here))
        assert count.empty_documents == sum(text == "" for text, _ in here)
        assert count.held_out_documents == sum(text in held_out for text, _ in here)
        kept = [weight for text, weight in here if text and text not in held_out]
        assert count.unweighted_documents == sum(weight == 0 for weight in kept)
        assert count.drawn_documents <= sum(weight > 0 for weight in kept)
    assert sum(count.drawn_documents for count in sample.counts.values()) == len(sample.texts)
    assert sum(count.drawn_bytes for count in sample.counts.values()) == len("".join(sample.texts).encode()) <= budget
    assert sum(count.cut_documents for count in sample.counts.values()) <= 1


def test_documents_are_drawn_in_proportion_to_their_weight() -> None:
    documents = [
        (f"{i:08}", language, weight) for i in range(8000) for language, weight in [(("a", 1.0), ("b", 3.0))[i % 2]]
    ]
    sample = draw(documents, 8 * 1000, held_out_fraction=1e-9)
    drawn = {language: count.drawn_documents for language, count in sample.counts.items()}
    # Each weight-1 document with probability 1/16, each weight-3 one with 3/16: 250 and 750, standard deviation 14.
    assert sum(drawn.values()) == 1000 and abs(drawn["a"] - 250) < 4 * 14


def test_shares() -> None:
    documents = [(f"{language} {i:06}", language, 1.0) for i in range(500) for language in ("aa", "bb", "cc")]
    sample = draw(documents, 1000, shares={"aa": 0.75, "bb": 0.25}, held_out_fraction=0.01)
    assert {language: count.drawn_bytes for language, count in sample.counts.items()} == {"aa": 750, "bb": 250, "cc": 0}
    assert set(sample.held_out) == {"aa", "bb", "cc"} and sample.shortfalls() == []
    sample = draw(documents, 100_000, shares={"aa": 0.75, "bb": 0.25}, held_out_fraction=0.01)
    first, second = sample.shortfalls()
    assert first == f"aa: {sample.counts['aa'].drawn_bytes:,} bytes of the 75,000 its share asks for"
    assert second.startswith("bb")


def test_held_out_text_is_bounded() -> None:
    documents = [(f"{i:06}", "en", 1.0) for i in range(1000)]
    sample = draw(documents, 600, held_out_bytes=60)
    assert len(sample.held_out["en"]) == 10 and sample.counts["en"].held_out_documents > 200
    assert all((split_of(text, 0.3) == "validation") for text in sample.held_out["en"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_bytes": 0}, "sample_bytes = 0 is not valid: it must be positive"),
        ({"held_out_fraction": 0.0}, r"held_out_fraction = 0.0 is not valid: it must be in \(0, 1\)"),
        ({"held_out_bytes": 0}, "held_out_bytes = 0 is not valid"),
        ({"shares": {"zh": 0.5, "en": 0.4}}, "shares = .* is not valid: they must be positive with sum 1"),
        ({"shares": {"zh": 1.5, "en": -0.5}}, "shares = .* is not valid: they must be positive with sum 1"),
        ({"shares": {"fr": 1.0}}, "none is for training in language 'fr', which has a share; languages found: en."),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw([("text", "en", 1.0)], **{"sample_bytes": 10, **options})


def test_bad_documents() -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight = .* is not valid: it must be at least 0"):
            draw([("text", "en", weight)], 10)
    with pytest.raises(ValueError, match="documents are not valid: none is for training; languages found: none."):
        draw([], 10)
