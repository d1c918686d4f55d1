"""Where a context ends and its continuation begins, and the windows of a long text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate.encoding import Encoded, cut_windows, encode_pairs

PIECES = {"ab": 1, "a": 2, "b": 3, "c": 4, " b": 5, " ": 6, "\n": 7}


class Pieces:
    """Longest piece first: "ab" is one, so that a context "a" has no end in front of "b"."""

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
            ids.append(PIECES[piece])
            text = text[len(piece) :]
        return ids

    def encode_batch(self, texts) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def encode(*pair: str) -> Encoded:
    return encode_pairs(Pieces(), [pair], prefix_id=99)[0]


@pytest.mark.parametrize(
    ("pair", "context", "continuation", "fallback"),
    [
        (("c", "b"), [4], [3], False),
        (("c ", "b"), [4], [5], False),  # the space belongs to the continuation
        (("c\n ", "b"), [4], [7, 5], False),
        (("a", "b"), [2], [3], True),  # one piece: nothing would be left
        (("a", "bc"), [2], [4], True),  # the whole does not begin with the context: cut as lm-eval does
        (("", "ab"), [99], [1], False),
        (("  ", "b"), [99], [6, 5], False),
    ],
)
def test_pairs_are_cut_at_the_end_of_the_context(pair, context, continuation, fallback):
    assert encode(*pair) == (context, continuation, fallback)


@given(st.text("abc \n", max_size=6), st.text("abc \n", min_size=1, max_size=6))
def test_both_together_say_the_whole(context, continuation):
    found = encode(context, continuation)
    names = {number: piece for piece, number in PIECES.items()} | {99: ""}
    said = "".join(names[i] for i in [*found.context, *found.continuation])
    assert found.context and found.continuation
    assert said == context + continuation or found.fallback


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", 3), ("a", "")])
def test_anything_but_two_texts_is_refused(pair):
    with pytest.raises(ValueError, match=r"pairs\[1\]"):
        encode_pairs(Pieces(), [("a", "b"), pair], 1)


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_windows_score_every_token_once_with_all_the_context_that_fits(count, length, data):
    stride = data.draw(st.integers(1, length))
    ids = list(range(100, 100 + count))
    windows = list(cut_windows(ids, 1, length, stride))
    assert [i for window in windows for i in window.continuation] == ids
    for number, (context, continuation) in enumerate(windows):
        if number == 0:
            assert (context, continuation) == ([1], ids[:length])
        else:
            assert len(context) + len(continuation) == length + 1
            assert context[-1] == continuation[0] - 1
            assert len(continuation) == stride or number == len(windows) - 1
