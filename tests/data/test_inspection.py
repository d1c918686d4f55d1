import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.data import inspection, row_stream
from bc2_jax.data.inspection import BINS_PER_OCTAVE, BenchmarkCounts, inspect_sources, read_benchmark
from bc2_jax.data.ngrams import hash_ngrams
from bc2_jax.data.packing import MANIFEST, Split, iterate_rows, split_of
from bc2_jax.data.row_stream import RowSource, find_sources, read_document
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

N = 5


def lines(rng: np.random.Generator, count: int) -> list[str]:
    """Lines of unrelated words: no n-gram of one is likely to be in another."""
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 80)) for _ in range(count)]


def side(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    held_out = [text for text in texts if (split_of(text, fraction) == "validation")]
    return [text for text in texts if text not in held_out], held_out


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return lines(np.random.default_rng(0), 60)


@pytest.fixture(scope="module")
def sources(tokenizer: Tokenizer, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[RowSource]:
    """`a` holds out some texts; `b` has one of them in training, half of another and a piece of a third."""
    _, held_out = side(texts, 0.2)
    assert len(held_out) > 3
    folder = tmp_path_factory.mktemp("rows")
    pack_texts(texts, tokenizer, folder / "a", 32, validation_fraction=0.2, rows_per_file=40)
    others = ["unrelated", held_out[1], "x y z" + held_out[2][:60], held_out[3][:25]]
    pack_texts(others, tokenizer, folder / "b", 32, validation_fraction=0)
    return find_sources([folder])


def test_counts_agree_with_the_texts(sources: list[RowSource], tokenizer: Tokenizer, texts: list[str]) -> None:
    read = []
    found = inspect_sources(sources, n=N, advance=read.append)
    assert [(counts.source, counts.split) for counts in found.splits] == [
        ("a", "train"), ("a", "validation"), ("b", "train"), ("b", "validation")
    ]  # fmt: skip
    for counts, here in zip(found.splits[:2], side(texts, 0.2), strict=True):
        lengths = [len(tokenizer.encode(text)) for text in here]
        assert counts.documents == len(here) and counts.tokens == sum(lengths) + len(here)
        assert counts.longest_document == max(lengths) and counts.characters == sum(map(len, here))
        assert counts.rows * 32 + 1 == counts.tokens + counts.padding
        for index, count in enumerate(counts.length_histogram):
            bounds = 2 ** (index / BINS_PER_OCTAVE), 2 ** ((index + 1) / BINS_PER_OCTAVE)
            assert count == sum(bounds[0] <= length < bounds[1] for length in lengths)
        assert sum(counts.length_histogram) == len(here) and counts.unfinished_tokens == 0
    assert found.splits[3].documents == found.splits[3].rows == found.splits[3].padding == 0
    assert found.differences == ()
    assert sum(read) == sum(counts.tokens for counts in found.splits)


def test_copies_of_held_out_documents_are_found(
    sources: list[RowSource], tokenizer: Tokenizer, texts: list[str]
) -> None:
    _, held_out = side(texts, 0.2)
    found = inspect_sources(sources, n=N)
    by_name = {source.name: source for source in sources}
    (exact,) = found.exact
    assert (exact.held_out.source, exact.training.source, exact.share) == ("a", "b", 1.0)
    for place in (exact.held_out, exact.training):
        ids = read_document(by_name[place.source], place.split, place.position, 1000)
        assert tokenizer.decode(ids.tolist()) == held_out[1]
        assert place.row == place.position // 32
    (near,) = found.near
    ids = read_document(by_name["a"], "validation", near.held_out.position, 1000).tolist()
    assert tokenizer.decode(ids) == held_out[2] and near.tokens == len(ids)
    there = tokenizer.encode("x y z" + held_out[2][:60])
    ngrams = [ids[i : i + N] for i in range(len(ids) - N + 1)]
    known = [there[i : i + N] for i in range(len(there) - N + 1)]
    common = [ngram for ngram in ngrams if ngram in known]
    assert near.share == len(common) / len(ngrams) >= 0.5
    assert read_document(by_name["b"], "train", near.training.position, N).tolist() == common[0]
    assert found.compared_documents == len(held_out)


def test_chunks_change_nothing(sources: list[RowSource], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect_sources(sources, n=N)
    assert whole.exact and whole.near
    for chunk_tokens in (1, 100):
        monkeypatch.setattr(row_stream, "iterate_rows", functools.partial(iterate_rows, chunk_tokens=chunk_tokens))
        assert len(list(row_stream.stream_tokens(sources[0], "validation"))) > 3
        assert inspect_sources(sources, n=N) == whole


def test_a_document_without_an_end_is_counted_and_disturbs_no_other(
    sources: list[RowSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(sources[0], name="broken")

    def stream_tokens(source: RowSource, split: Split) -> Iterator[tuple[int, np.ndarray]]:
        for start, tokens in row_stream.stream_tokens(source, split):
            yield start, tokens[:-3] if source is broken and split == "validation" else tokens

    monkeypatch.setattr(inspection, "stream_tokens", stream_tokens)
    found = inspect_sources([broken, *sources], n=N)
    counts = found.splits[1]
    assert counts.documents == sources[0].manifest.validation.documents - 1 and counts.unfinished_tokens > 0
    assert len(found.differences) == 3
    assert [copy for copy in found.near if copy.held_out.source == "a"] == list(inspect_sources(sources, n=N).near)


def test_the_share_of_near_copies_and_the_sample_can_be_chosen(sources: list[RowSource]) -> None:
    assert len(inspect_sources(sources, n=N, near_share=0.05).near) == 2
    assert len(inspect_sources(sources, n=N, near_share=1.0).near) == 0
    held_out = sources[0].manifest.validation
    some = inspect_sources(sources, n=N, near_tokens=held_out.tokens // 2)
    assert 0 < some.compared_documents < held_out.documents and len(some.exact) == 1
    for arguments, message in (
        ({"n": 1}, "ngram = 1 is not valid: it must be at least 2"),
        ({"near_share": 0.0}, r"near_share = 0.0 is not valid: it must be in \(0, 1\]"),
        ({"near_tokens": 0}, "near_tokens = 0 is not valid: it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_sources(sources, **arguments)


def test_benchmark_items_in_training_are_found(
    sources: list[RowSource], tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    train, held_out = side(texts, 0.2)
    (strange,) = lines(np.random.default_rng(1), 1)
    (tmp_path / "items.txt").write_text(
        f"{train[5]}\n\n{strange}\n{strange[:40]}{train[7][20:60]}\nab\n{held_out[0]}\n"
    )
    items = list(read_benchmark(tmp_path / "items.txt", tokenizer, N))
    found = inspect_sources(sources, items, n=N)
    assert found.benchmarks == (BenchmarkCounts(str(tmp_path / "items.txt"), items=5, short=1, hit=2),)
    first, third = found.hits  # the one that is only held out contaminates nothing
    assert (first.file, first.line, third.line) == (str(tmp_path / "items.txt"), 1, 4)
    assert first.beginning == train[5][:80]
    assert first.share == 1 and 0 < third.share < 0.6
    place = first.training
    assert place.source == "a" and place.row == place.position // 32
    assert tokenizer.decode(read_document(sources[0], "train", place.position, 1000).tolist()) == train[5]


def test_what_counts_of_a_benchmark_object(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    item = {"question": "which of the modules", "choices": ["argparse and more", "no"], "id": 7}
    file.write_text(json.dumps(item) + "\n\n")

    def hashes(*texts: str) -> list[int]:
        return [int(h) for text in texts for h in hash_ngrams(np.array(tokenizer.encode(text)), 3)]

    (whole,) = read_benchmark(file, tokenizer, 3)
    assert whole.hashes.tolist() == hashes(item["question"], *item["choices"])
    (part,) = read_benchmark(file, tokenizer, 3, ["choices", "missing"])
    assert part.hashes.tolist() == hashes(*item["choices"])
    with pytest.raises(
        ValueError, match=r"items.jsonl:1'? is not valid: it must be an object with one of the fields x"
    ):
        list(read_benchmark(file, tokenizer, 3, ["x"]))
    file.write_text("{}\nno json\n")
    with pytest.raises(ValueError, match="items.jsonl:2 is not valid: the line is not JSON"):
        list(read_benchmark(file, tokenizer, 3))
    file.write_bytes(b"{}\n\xff\n")
    with pytest.raises(ValueError, match="items.jsonl:2 is not valid: the line is not UTF-8"):
        list(read_benchmark(file, tokenizer, 3))
    with pytest.raises(ValueError, match=r"items.csv' is not valid: legal are .txt and .jsonl"):
        list(read_benchmark(tmp_path / "items.csv", tokenizer, 3))


def test_rows_that_are_not_what_the_manifest_says(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    pack_texts(texts[:4], tokenizer, tmp_path / "rows", 32, validation_fraction=0)
    fields = json.loads((tmp_path / "rows" / MANIFEST).read_text())
    fields["train"]["documents"] += 1
    (tmp_path / "rows" / MANIFEST).write_text(json.dumps(fields))
    found = inspect_sources(find_sources([tmp_path]), n=N)
    assert found.differences == ("rows train: 4 documents in the rows, 5 in the manifest",)
