import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.ngrams import hash_positions, mix
from bc2_jax.data.packing import split_of
from bc2_jax.data.row_stream import DocumentScan, find_sources, read_document, stream_tokens
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

EOS = 2


@given(
    st.lists(st.text(st.sampled_from("ab 汉\n"), min_size=1, max_size=40), max_size=12),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_the_stream_and_its_documents_come_back(
    tokenizer: Tokenizer, texts: list[str], length: int, rows_per_file: int
) -> None:
    texts = ["first", *texts]
    with tempfile.TemporaryDirectory() as folder:
        pack_texts(texts, tokenizer, f"{folder}/rows", length, validation_fraction=0.3, rows_per_file=rows_per_file)
        (source,) = find_sources([folder])
        for split in ("train", "validation"):
            here = [text for text in texts if split_of(text, 0.3) == split]
            documents = [tokenizer.encode(text) for text in here]
            stream = [token for ids in documents for token in [*ids, EOS]]
            chunks = list(stream_tokens(source, split))
            assert [token for _, tokens in chunks for token in tokens.tolist()] == stream
            assert [start for start, _ in chunks] == [
                sum(len(tokens) for _, tokens in chunks[:index]) for index in range(len(chunks))
            ]
            start = 0
            for ids in documents:
                assert read_document(source, split, start, 10**6).tolist() == ids
                assert read_document(source, split, start + 1, 3).tolist() == ids[1:4]
                start += len(ids) + 1


@given(
    st.lists(st.lists(st.integers(3, 5), max_size=8), max_size=8),
    st.lists(st.integers(3, 5), max_size=4),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_documents_are_the_same_however_the_stream_is_cut(
    documents: list[list[int]], rest: list[int], cuts: list[int]
) -> None:
    stream = [token for document in documents for token in [*document, EOS]] + rest
    scan = DocumentScan(EOS)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    starts, lengths, hashes = [], [], []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        found = scan.add(start, np.array(stream[start:stop], np.uint32))
        starts += found.start.tolist()
        lengths += found.length.tolist()
        hashes += found.hash.tolist()
    assert [stream[a : a + n] for a, n in zip(starts, lengths, strict=True)] == documents
    assert all(stream[a + n] == EOS for a, n in zip(starts, lengths, strict=True))
    for document, code in zip(documents, hashes, strict=True):
        tokens = np.array(document, np.uint32)
        total = hash_positions(tokens, np.arange(len(tokens))).sum(dtype=np.uint64)
        assert code == int(mix(np.array([total]))[0])
    assert len(set(hashes)) == len(set(map(tuple, documents)))
    assert scan.unfinished == len(rest)


def test_sources_are_found_named_and_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, length in (("web/q0", 8), ("web/q1", 8), ("code", 8), (".hidden.incomplete", 8), ("other", 4)):
        pack_texts(["some text"], tokenizer, tmp_path / "all" / name, length, validation_fraction=0)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "all" / "other", tmp_path / "elsewhere" / "other")
    sources = find_sources([tmp_path / "all" / "web", tmp_path / "all"])
    assert [source.name for source in sources] == ["code", "web/q0", "web/q1"]
    assert [source.name for source in find_sources([tmp_path / "all" / "code"])] == ["code"]
    assert [source.name for source in find_sources([tmp_path / "all" / "web"])] == ["q0", "q1"]
    both = find_sources([tmp_path / "all" / "web" / "q1", tmp_path / "all" / "code"])
    assert [source.name for source in both] == ["code", "web/q1"]
    with pytest.raises(FileNotFoundError, match=r"ROWS = .*nothing.* is not valid: it must hold a manifest.json"):
        find_sources([tmp_path / "all", tmp_path / "nothing"])
    with pytest.raises(ValueError, match="sequence_length of elsewhere/other = 4 is not valid: all/code has 8"):
        find_sources([tmp_path])
    (rows,) = (tmp_path / "all" / "web" / "q1").glob("train*")
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ValueError, match="q1.* is damaged"):
        find_sources([tmp_path / "all"])
