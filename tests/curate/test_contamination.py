"""Matches against plain sets of n-grams; the reading of benchmark files."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.contamination import (
    ContaminationConfig,
    count_documents,
    find_contaminated,
    load_benchmark_ngrams,
)
from bc2_jax.curate.tokens import find_ngrams, hash_ngrams, hash_tokens
from bc2_jax.data.ngrams import make_table

WORDS = [f"w{i}" for i in range(400)]


def sentence(seed: int, size: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=size))


def write(path, items: list) -> str:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return str(path)


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=8),
    st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=2), max_size=6),
)
def test_every_known_ngram_is_found_once_a_document(documents, known):
    tokens = hash_tokens([" ".join(words) for words in documents])
    grams = [hash_ngrams(hash_tokens([" ".join(pair)]), 2).hashes[0] for pair in known]
    table = make_table(2, np.array(grams, np.uint64), np.arange(len(known)))
    found = sorted((d, int(table.numbers[r])) for d, r in zip(*find_ngrams(table, tokens), strict=True))
    expected = [
        (d, k)
        for d, words in enumerate(documents)
        for k, pair in enumerate(known)
        if any(words[i : i + 2] == pair for i in range(len(words)))
    ]
    assert found == expected


def test_a_document_with_thirteen_tokens_of_a_question_is_found_with_its_share(tmp_path):
    items = [sentence(k, 26) for k in range(4)]
    ngrams = load_benchmark_ngrams([write(tmp_path / "b.jsonl", [{"question": item} for item in items])])
    words = items[2].split()
    texts = [
        "before " + items[0] + " after",
        " ".join(words[5:18]),
        " ".join(words[5:17]) + " other",
        ", ".join(words[5:18]).replace("w", "W"),
        sentence(99, 200),
        items[1].replace(" ", ",\n") + items[3],  # the word at the seam is of neither
    ]
    matches = find_contaminated(texts, ngrams)
    assert [(m.document, m.item) for m in matches] == [
        (0, "b.jsonl:1"), (1, "b.jsonl:3"), (5, "b.jsonl:2"), (5, "b.jsonl:4"),
    ]  # fmt: skip
    np.testing.assert_allclose([m.share for m in matches], [1, 1 / 14, 13 / 14, 13 / 14])
    first = [" ".join(words.split()[at : at + 13]) for words, at in ((items[0], 0), (items[2], 5))]
    assert [m.ngram for m in matches[:2]] == first
    assert matches[2].ngram == ", ".join(items[1].split()[:13]) + ","
    assert [m.document for m in find_contaminated(texts, ngrams, min_share=0.5)] == [0, 5, 5]


def test_han_characters_are_tokens_but_no_words(tmp_path):
    question = "下列关于光合作用的说法中，错误的是哪一项？请选择。"
    ngrams = load_benchmark_ngrams([write(tmp_path / "b.jsonl", [{"question": question}])])
    quoted = "列关于光合作用的说法中， 错误的是哪一项？请选择"
    texts = [f"网页上写着：{quoted}", "关于光合作用的说法中有很多错误", "光合作用的说法有很多。"]
    assert find_contaminated(texts, ngrams) == [(0, "b.jsonl:1", 0.5, quoted)]


@pytest.mark.parametrize("length, found", [(8, False), (12, False), (13, True), (40, True)])
def test_a_short_item_is_no_evidence(tmp_path, length, found):
    """Eight Han characters are about five words, and occur in pages unrelated to the question."""
    item = "".join(chr(0x4E00 + i) for i in random.Random(5).sample(range(3000), length))
    ngrams = load_benchmark_ngrams([write(tmp_path / "b.jsonl", [{"question": item}])])
    assert bool(find_contaminated([f"前文{item}后文"], ngrams)) == found


def test_fields_of_an_item_are_read_apart_and_lists_whole(tmp_path):
    a, b, c = sentence(1, 13), sentence(2, 13), sentence(3, 13)
    row = {"question": a, "choices": {"text": [b], "label": ["A"]}, "id": c}
    ngrams = load_benchmark_ngrams([write(tmp_path / "b.jsonl", [row])])
    half = " ".join([*a.split()[7:], *b.split()[:7]])
    assert [m.document for m in find_contaminated([a, b, c, half], ngrams)] == [0, 1]
    ngrams = load_benchmark_ngrams([tmp_path / "b.jsonl"], ContaminationConfig(fields=("id",)))
    assert [m.document for m in find_contaminated([a, b, c, half], ngrams)] == [2]


def test_lines_of_a_text_file_are_items(tmp_path):
    (tmp_path / "b.txt").write_text(f"{sentence(1, 14)}\n\n{sentence(2, 14)}\n")
    matches = find_contaminated([sentence(2, 14)], load_benchmark_ngrams([tmp_path / "b.txt"]))
    assert [m[:3] for m in matches] == [(0, "b.txt:3", 1.0)]


def test_files_of_short_items_are_searched_with_shorter_ngrams(tmp_path):
    short = write(tmp_path / "short.jsonl", [{"question": sentence(k, 9)} for k in range(20)])
    long = write(tmp_path / "long.jsonl", [{"question": sentence(100 + k, 30)} for k in range(20)])
    tiny = write(tmp_path / "tiny.jsonl", [{"question": sentence(200, 5)}])
    ngrams = load_benchmark_ngrams([short, long, tiny])
    assert [table.n for table in ngrams.tables] == [8, 9, 13] and len(ngrams.items) == 41
    texts = [sentence(3, 9), " ".join(sentence(103, 30).split()[:12]), sentence(200, 5), sentence(104, 30)]
    assert [(m.document, m.item) for m in find_contaminated(texts, ngrams)] == [
        (0, "short.jsonl:4"), (3, "long.jsonl:5"),
    ]  # fmt: skip


def test_frames_of_questions_and_common_phrases_are_no_evidence(tmp_path):
    frame, phrase = sentence(1, 13), sentence(2, 13)
    items = [{"question": f"{frame} {sentence(10 + k, 20)}"} for k in range(5)] + [{"question": phrase}]
    file = write(tmp_path / "b.jsonl", items)
    texts = [frame, *[phrase + " x"] * 3, sentence(12, 20)]
    config = ContaminationConfig(max_items=4)
    ngrams = load_benchmark_ngrams([file], config)
    assert [m.document for m in find_contaminated(texts, ngrams)] == [1, 2, 3, 4]
    assert {m.document for m in find_contaminated(texts, load_benchmark_ngrams([file]))} == {0, 1, 2, 3, 4}
    # Counts of two shards add up.
    shards = count_documents(texts[:2], ngrams), count_documents(texts[2:], ngrams)
    counts = [a + b for a, b in zip(*shards, strict=True)]
    assert [m.document for m in find_contaminated(texts, ngrams.without_frequent(counts, 2))] == [4]
    assert [m.document for m in find_contaminated(texts, ngrams.without_frequent(counts, 3))] == [1, 2, 3, 4]


def test_bad_files_and_fields_are_named(tmp_path):
    bad = tmp_path / "b.jsonl"
    for content, said in (
        ("no json\n", "benchmarks = .*b.jsonl:1 is not valid: the line is not JSON"),
        ("[1]\n", "benchmarks = .*b.jsonl:1' is not valid: it must be an object with one of the fields question"),
        ('{"other": "a"}\n', "it must be an object with one of the fields question"),
        ('{"question": []}\n', "contamination.files = .* it has no text in question"),
    ):
        bad.write_text(content)
        with pytest.raises(ValueError, match=said):
            load_benchmark_ngrams([bad])
    with pytest.raises(ValueError, match="benchmarks = .* it must be a file"):
        load_benchmark_ngrams([tmp_path / "missing.txt"])
    for fields in (dict(n=7), dict(min_share=1.0), dict(max_items=0), dict(files=("a.csv",)), dict(action="keep")):
        with pytest.raises(ValueError, match=f"contamination.{next(iter(fields))} = .* is not valid: "):
            ContaminationConfig(**fields)
