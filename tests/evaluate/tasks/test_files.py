"""Files of text with worked examples, and benchmarks that are one file."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate.tasks.reading import find_file, read_lines, read_shots, read_text, split_shots
from tests.evaluate.tasks.files import write

WORDS = st.text(alphabet="ab 12.?", min_size=1, max_size=8).map(lambda text: f"x{text}".rstrip())


@given(st.lists(st.tuples(WORDS, WORDS), max_size=5), st.integers(1, 3))
def test_what_is_joined_is_split_again(pairs, blank):
    shots = [f"Q: {question}\nMore, Q: no opening\nA: {answer}" for question, answer in pairs]
    gap = "\n" * blank
    before, found = split_shots(gap.join(["About this.", *shots]) + gap, "Q:")
    assert (before, found) == ("About this.", shots)


def test_text(tmp_path):
    assert read_text(write(tmp_path / "a", b"\xef\xbb\xbfa\r\nb\r\n")) == "a\nb\n"
    packed = gzip.compress("甲\n".encode() * 99)
    assert read_text(write(tmp_path / "b.gz", packed)) == "甲\n" * 99
    with pytest.raises(ValueError, match="b.gz can't be read: .*ends in the middle"):
        read_text(write(tmp_path / "b.gz", packed[:-9]))
    with pytest.raises(ValueError, match=r"a is not UTF-8 \(invalid start byte at byte 1\)"):
        read_text(write(tmp_path / "a", b"a\xff"))


def test_lines(tmp_path):
    assert read_lines(write(tmp_path / "a", "one\u2028still one\r\ntwo")) == ["one\u2028still one", "two"]
    with pytest.raises(ValueError, match="a:2 is empty: each line must be a sentence"):
        read_lines(write(tmp_path / "a", "one\n\ntwo\n"))
    with pytest.raises(ValueError, match="a:1 is empty"):
        read_lines(write(tmp_path / "a", ""))


def test_shots(tmp_path):
    path = write(tmp_path / "shots.txt", "About.\n\nQ: 1\nA: one\n\n\nQ: 2\nA:\ntwo\n")
    assert read_shots(path, "Q:", "A:", 1) == ("About.", ["Q: 1\nA: one"])
    assert read_shots(path, "Q:", "A:", 2)[1][1] == "Q: 2\nA:\ntwo"
    with pytest.raises(ValueError, match="has 2 worked examples instead of 3"):
        read_shots(path, "Q:", "A:", 3)


def test_the_first_name_and_the_folder_of_the_benchmark_come_first(tmp_path):
    write(tmp_path / "b.jsonl", "outside")
    assert find_file(tmp_path, ("bench",), ("", "data"), ("a.jsonl", "b.jsonl"), "s").read_text() == "outside"
    write(tmp_path / "Bench" / "data" / "b.jsonl.gz", "inside")
    assert find_file(tmp_path, ("bench",), ("", "data"), ("a.jsonl", "b.jsonl"), "s").read_text() == "inside"
    write(tmp_path / "Bench" / "data" / "a.jsonl", "first")
    assert find_file(tmp_path, ("bench",), ("", "data"), ("a.jsonl", "b.jsonl"), "s").read_text() == "first"
    with pytest.raises(FileNotFoundError, match="source"):
        find_file(tmp_path, ("bench",), ("",), ("c.jsonl",), "source")
