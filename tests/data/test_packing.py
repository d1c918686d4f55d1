import collections
import dataclasses
import functools
import hashlib
import json
import logging
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.data.corpus import list_parts
from bc2_jax.data.packing import load_manifest, read_rows, split_of
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.tokenizer import Tokenizer
from tests.packed_rows import pack_texts

DOCUMENTS = st.lists(st.text(st.sampled_from("ab \n汉"), max_size=30), max_size=25)


def expected_stream(documents: list[str], tokenizer: Tokenizer) -> list[int]:
    return [i for document in documents for i in [*tokenizer.encode(document), 2]]


@given(DOCUMENTS, st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_rows_are_the_stream_and_every_token_but_the_first_is_a_target_once(
    tokenizer: Tokenizer, documents: list[str], length: int, rows_per_file: int
) -> None:
    documents = ["first", *documents]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows")
        manifest = pack_texts(documents, tokenizer, out, length, validation_fraction=0.3, rows_per_file=rows_per_file)
        assert load_manifest(out) == manifest
        texts = [document for document in documents if document]
        assert manifest.documents == len(documents) and manifest.empty_documents == len(documents) - len(texts)
        for name in ("train", "validation"):
            info = manifest.split(name)
            here = [text for text in texts if split_of(text, 0.3) == name]
            stream = expected_stream(here, tokenizer)
            rows = read_rows(out, name)
            assert rows.dtype == np.uint32 and rows.shape == (info.rows, length + 1)
            targets = [int(token) for row in rows for token in row[1:] if token != 0]
            assert targets == stream[1:]
            for row, following in zip(rows[:-1], rows[1:], strict=True):
                assert row[-1] == following[0]
            assert not len(rows) or rows[0, 0] == stream[0]
            assert info.tokens == len(stream) and info.documents == len(here)
            assert info.characters == sum(map(len, here)) and info.bytes == len("".join(here).encode())
            assert info.padding == (rows == 0).sum() < length + 1
            assert [file.rows for file in info.files[:-1]] == [rows_per_file] * (len(info.files) - 1)


def test_files_are_named_hashed_and_counted(tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> None:
    manifest = pack_texts(modules, tokenizer, tmp_path / "rows", 64, validation_fraction=0.3, rows_per_file=500)
    names = [file.name for split in (manifest.train, manifest.validation) for file in split.files]
    assert names[0] == f"train-00000-of-{len(manifest.train.files):05d}.array_record" and len(names) > 2
    assert sorted([*names, "manifest.json"]) == sorted(path.name for path in (tmp_path / "rows").iterdir())
    for file in (*manifest.train.files, *manifest.validation.files):
        content = (tmp_path / "rows" / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for split in ("train", "validation"):
        checksums = [zlib.crc32(row.tobytes()) for row in read_rows(tmp_path / "rows", split)]
        for file in manifest.split(split).files:
            assert file.rows_crc32 == zlib.crc32(np.array(checksums[: file.rows], "<u4").tobytes())
            del checksums[: file.rows]
        assert not checksums
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (tokenizer.fingerprint, 640)
    assert (manifest.eos_id, manifest.pad_id, manifest.sequence_length) == (2, 0, 64)


def test_same_input_gives_same_bytes(tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> None:
    first, second = (pack_texts(iter(modules), tokenizer, tmp_path / name, 64) for name in "ab")
    assert first == second


def test_no_validation_document_is_in_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [f"document number {i}" for i in range(1000)]
    manifest = pack_texts(documents * 2, tokenizer, tmp_path / "rows", 32, validation_fraction=0.1)
    assert 60 <= manifest.validation.documents / 2 <= 140
    seen: dict[str, collections.Counter[str]] = {}
    for name in ("train", "validation"):
        rows = read_rows(tmp_path / "rows", name)
        stream = [int(rows[0, 0]), *(int(i) for row in rows for i in row[1:])]
        text = "".join("\f" if i == 2 else tokenizer.piece(i) for i in stream if i)
        seen[name] = collections.Counter(text.removesuffix("\f").replace("\u2581", " ").split("\f"))
    assert not seen["train"].keys() & seen["validation"].keys()
    assert seen["train"] + seen["validation"] == collections.Counter(documents * 2)


def test_a_larger_fraction_only_adds_to_what_split_of() -> None:
    documents = [str(i) for i in range(500)]
    small, large = ({d for d in documents if split_of(d, fraction) == "validation"} for fraction in (0.05, 0.2))
    assert small < large
    assert all(split_of(d, 0.0) == "train" for d in documents)


def test_invalid_documents_are_counted_and_logged(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": text}) for text in ("good", "", "a\ud800", None, "also good")]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*lines[:4], "{no", lines[4]]))
    with caplog.at_level(logging.WARNING):
        corpus = tokenize_corpus([file], tokenizer.path, tmp_path / "rows", Settings(8, 1, validation_fraction=0))
    assert (corpus.documents, corpus.empty_documents, corpus.invalid_documents) == (6, 1, 3)
    (part,) = list_parts(tmp_path / "rows")
    manifest = load_manifest(part.path)
    assert manifest.train.documents == 2 and manifest.validation.documents == manifest.validation.rows == 0
    assert read_rows(part.path, "validation").shape == (0, 9)
    assert [record.getMessage() for record in caplog.records][:3] == [
        f"left out: {file}:3: field 'text' has half of a surrogate pair (at character 1)",
        f"left out: {file}:4: field 'text' is null, not a string",
        f"left out: {file}:5: the line is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1))",
    ]


def test_text_forges_neither_end_nor_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = pack_texts(["a</s>b<unk>c<s><reserved_106>"], tokenizer, tmp_path / "rows", 50, validation_fraction=0)
    row = read_rows(tmp_path / "rows", "train")[0]
    assert (row == 2).sum() == 1 and (row == 0).sum() == manifest.train.padding
    assert not np.isin(row, [1, 195, 196]).any()


def test_existing_folder_is_refused_or_replaced_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    text = tmp_path / "text.txt"
    text.write_text("new text")
    pack_texts(["old text"], tokenizer, out, 8, validation_fraction=0)
    before = load_manifest(out)
    pack = functools.partial(tokenize_corpus, [text], tokenizer.path, out, Settings(4, validation_fraction=0))
    with pytest.raises(FileExistsError, match=r"out_dir = .*rows.* it exists; choose another or pass overwrite"):
        pack()

    def fail(stage: str, done: int, total: int) -> None:
        if stage == "packing":
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        pack(overwrite=True, advance=fail)
    assert load_manifest(out) == before
    pack(overwrite=True)
    (part,) = list_parts(out)
    assert load_manifest(part.path).sequence_length == 4 and not (out / "manifest.json").exists()
    assert {path.name for path in tmp_path.iterdir()} - {".rows.lock"} == {"rows", "text.txt"}


def test_overwrite_never_deletes_other_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="only a folder of packed rows can be overwritten"):
        tokenize_corpus([tmp_path / "thesis.txt"], tokenizer.path, tmp_path, Settings(8), overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 0}, "sequence_length = 0 is not valid: it must be positive"),
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0 is not valid: it must be in \[0, 1\)"),
        ({"rows_per_file": 0}, "rows_per_file = 0 is not valid"),
        ({"texts": []}, "none of the 0 has any text"),
        ({"texts": ["", ""]}, "none of the 2 has any text"),
    ],
)
def test_bad_arguments(tokenizer: Tokenizer, tmp_path: Path, arguments: dict, message: str) -> None:
    good = {"texts": ["text"], "tokenizer": tokenizer, "out": tmp_path / "rows", "sequence_length": 8}
    with pytest.raises(ValueError, match=message):
        pack_texts(**(good | arguments))
    assert not list(tmp_path.iterdir())


def test_unreadable_manifests(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.sources.path = .* has no manifest.json"):
        load_manifest(tmp_path)
    manifest = pack_texts(["text"], tokenizer, tmp_path / "rows", 8)
    file = tmp_path / "rows" / "manifest.json"
    file.write_text(json.dumps(dataclasses.asdict(manifest) | {"format": 99}))
    with pytest.raises(ValueError, match="format = 99 in .* this version reads 1"):
        load_manifest(tmp_path / "rows")
    for kind, message in (("chat", None), ("table", r"kind in .* = 'table' is not valid: it must be text, chat")):
        file.write_text(json.dumps(dataclasses.asdict(manifest) | {"kind": kind}))
        if message is None:
            assert load_manifest(tmp_path / "rows").kind == kind
        else:
            with pytest.raises(ValueError, match=message):
                load_manifest(tmp_path / "rows")
    before = dataclasses.asdict(manifest)  # of a version that had one kind
    del before["kind"]
    file.write_text(json.dumps(before))
    assert load_manifest(tmp_path / "rows") == manifest and manifest.kind == "text"
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not a manifest of packed rows"):
        load_manifest(tmp_path / "rows")


@pytest.mark.parametrize("name", ["/etc/passwd", "../rows.array_record", "a/../../b", "", ".", "gs://b", "a\\b", "a\n"])
def test_a_manifest_leads_nowhere_else(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    manifest = dataclasses.asdict(pack_texts(["text"], tokenizer, tmp_path / "rows", 8))
    manifest["train"]["files"][0]["name"] = name
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"files.name = .* is not valid: it must be a file beside it"):
        read_rows(tmp_path / "rows", "train")
