"""Perplexity by file and language: the files, the figures, their standard errors, the program."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.cli import perplexity
from bc2_jax.data.documents import Fields
from bc2_jax.data.text_files import find_text_files
from bc2_jax.evaluate.perplexity import UNKNOWN, Text, group_by, make_group, measure, ratio, read_texts

EVALS = Path(__file__).parents[1] / "golden" / "evals"
GOLDEN = json.loads((EVALS / "golden.json").read_text("utf-8"))


class Rolled(NamedTuple):
    log_prob: float
    tokens: int
    bytes: int


class Counter:
    """A scorer for which every character is a token of probability 1 / 2."""

    def roll(self, texts, stride=None):
        return [Rolled(-math.log(2) * len(text), len(text), len(text.encode())) for text in texts]


def test_every_format_gives_the_same_texts(tmp_path):
    texts, languages = ["第一回 宴桃园", "a\r\nb", "…"], ["zh", "", None]
    records = [{"text": text, "language": one} for text, one in zip(texts, languages, strict=True)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(records, indent=1), "utf-8")
    pq.write_table(pa.table({"text": texts, "language": languages}), tmp_path / "e.parquet")
    for file in find_text_files([tmp_path]).files:
        found = list(read_texts(file, Fields(), "ja"))
        expected = [Text(text, file.name, one or "ja") for text, one in zip(texts, languages, strict=True)]
        assert found == expected
    (tmp_path / "f.txt.zst").write_bytes(zstandard.compress("﻿a\r\n\n第".encode()))
    (file,) = find_text_files([tmp_path / "f.txt.zst"]).files
    assert list(read_texts(file, Fields())) == [Text("a\r\n\n第", "f.txt.zst", "")]


def test_what_can_not_be_read_is_named(tmp_path):
    bad = [b'{"text": "a"}', b'{"txt": "b"}', b"{", b'{"text": 1}', b'{"text": "\\ud800"}', b'["a"]', b'{"text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(bad))
    (tmp_path / "b.txt").write_bytes("第一回".encode("gb18030"))
    first, second = find_text_files([tmp_path]).files
    found = list(read_texts(first, Fields()))
    assert [text.text for text in found if isinstance(text, Text)] == ["a", "c"]
    problems = [text for text in found if isinstance(text, str)]
    expected = [
        "the row has no field 'text'",
        "not JSON",
        "a number, not a string",
        "half of a surrogate pair",
        "not an object",
    ]
    assert all(problem in line for problem, line in zip(expected, problems, strict=True))
    assert [line.partition(": ")[0] for line in problems] == [f"a.jsonl:{number}" for number in range(2, 7)]
    assert "not UTF-8" in str(list(read_texts(second, Fields())))


def test_groups_are_sums_over_texts():
    texts = [Text("ab", "x", "en"), Text("第", "x", ""), Text("cdef", "y", "en")]
    told = []
    measured = measure(Counter(), texts, progress=lambda *counts: told.append(counts))
    assert told == [(3, 9)]
    total = make_group("all", measured)
    assert (total.texts, total.tokens, total.bytes) == (3, 7, 9)
    assert math.isclose(total.nats_per_token.value, math.log(2)) and math.isclose(total.perplexity, 2)
    assert math.isclose(total.bits_per_byte.value, 7 / 9)
    assert total.nats_per_token.stderr == pytest.approx(0, abs=1e-12)
    assert [(group.name, group.bytes) for group in group_by(measured, "language")] == [("en", 6), (UNKNOWN, 3)]
    alone = group_by(measured, "file")[1]
    assert alone.texts == 1 and math.isnan(alone.nats_per_token.stderr)
    assert alone.as_json()["nats_per_token_stderr"] is None  # JSON has no nan


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10**6)), min_size=2, max_size=50))
def test_standard_errors(pairs):
    """Of texts of one length it is that of a mean."""
    numerators = [numerator for numerator, _ in pairs]
    found = ratio(numerators, [7] * len(pairs))
    expected = np.std(numerators, ddof=1) / np.sqrt(len(pairs)) / 7
    assert math.isclose(found.value, np.mean(numerators) / 7, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(found.stderr, expected, rel_tol=1e-6, abs_tol=1e-9)
    assert ratio(numerators, [d for _, d in pairs]).value <= max(n / d for n, d in pairs) * (1 + 1e-9)


def test_standard_errors_against_drawing_texts_again():
    random = np.random.default_rng(0)
    sizes = random.integers(20, 2000, 400)
    losses = sizes * random.normal(3, 0.5, 400)
    drawn = random.integers(0, 400, (2000, 400))
    spread = np.std(losses[drawn].sum(1) / sizes[drawn].sum(1))
    assert ratio(losses, sizes).stderr == pytest.approx(spread, rel=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity") / "model"
    shutil.copytree(EVALS / "model", folder)
    shutil.copy(EVALS / "tokenizer" / "tokenizer.model", folder)
    return folder


def test_the_program_gives_lm_evals_figures(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copy(EVALS / "data" / "ppl.jsonl", tmp_path / "texts.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"no": 1}\n')
    out = tmp_path / "out.json"
    files = [str(tmp_path / "texts.jsonl"), str(tmp_path / "empty.jsonl")]
    assert perplexity.main([str(model), *files, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    found = json.loads(out.read_text("utf-8"))
    (file,), total = found["files"], found["total"]
    rows = GOLDEN["requests"]["g_ppl"]
    assert math.isclose(total["bits_per_byte"], GOLDEN["results"]["g_ppl"]["bits_per_byte"], rel_tol=2e-6)
    assert math.isclose(total["log_prob"], sum(row["loglikelihood"] for row in rows), rel_tol=2e-6)
    assert total["tokens"] == sum(row["num_tokens"] for row in rows)
    assert {**file, "name": "all"} == total and file["name"] == "texts.jsonl"
    assert {group["name"] for group in found["languages"]} >= {"zh", "en"}
    assert sum(group["bytes"] for group in found["languages"]) == total["bytes"]
    assert found["empty"] == 1 and len(found["problems"]) == 1
    assert f"{total['bits_per_byte']:.4f} +- {total['bits_per_byte_stderr']:.4f}" in printed.out
    assert "left out: empty.jsonl:2" in printed.err and "empty: 1 texts" in printed.err


def test_the_program_without_the_extra(model, tmp_path, capsys, monkeypatch):
    """Nothing identifies a language; windows that overlap give the long texts other figures."""
    monkeypatch.setitem(sys.modules, "fasttext", None)
    shutil.copy(EVALS / "data" / "ppl.jsonl", tmp_path / "texts.jsonl")
    (tmp_path / "b.zh.txt").write_text("却说玄德引军前进。" * 9, "utf-8")
    files = [str(tmp_path / "texts.jsonl"), str(tmp_path / "b.zh.txt")]
    out = tmp_path / "out.json"
    options = ["--language", "*.zh.txt=zh-Hans", "--stride", "128", "--json", str(out)]
    assert perplexity.main([str(model), *files, *options]) == 0
    found = json.loads(out.read_text("utf-8"))
    assert [group["name"] for group in found["languages"]] == [UNKNOWN, "zh"]
    whole = sum(row["loglikelihood"] for row in GOLDEN["requests"]["g_ppl"])
    assert found["stride"] == 128 and 1e-3 < abs(found["files"][0]["log_prob"] / whole - 1) < 0.1
    assert "pip install 'bc2_jax[data]'" in capsys.readouterr().err
    for wrong, message in (
        (["--stride", "257"], "--stride = 257 is not valid: a window has 256 tokens"),
        (["--language", "*.en=en"], "--language = '*.en=en' is not valid"),
        (["--limit", "0"], "--limit = 0 is not valid"),
    ):
        assert perplexity.main([str(model), *files, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert perplexity.main([str(model), files[0], "--text-field", "body"]) == 1
    assert "FILES: no text was found in" in capsys.readouterr().err
