"""The whole way from files to a corpus: what is in it, on any number of processes, stopped and started again."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data import tokenization
from bc2_jax.data.corpus import bucket_of, folder_name, list_parts, load_corpus, weight_level
from bc2_jax.data.documents import Fields
from bc2_jax.data.loader import make_train_loader
from bc2_jax.data.packing import load_manifest, read_rows, split_of
from bc2_jax.data.processes import ProcessPool
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.tokenizer import Tokenizer, train_tokenizer
from tests.packed_rows import pack_texts

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "tokenize_corpus.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
SMALL = Settings(sequence_length=32, validation_fraction=0.2, rows_per_file=50)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Wide, so that no message is wrapped; the package is importable from the repository as after installing it.
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def stream(path: Path, split="train") -> list[int]:
    rows = read_rows(path, split)
    return [int(rows[0, 0]), *(int(i) for row in rows for i in row[1:] if i)] if len(rows) else []


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few documents are a unit, and every few tokens of one are written."""
    monkeypatch.setattr(tokenization, "_UNIT_BYTES", range(3000, 3001))
    monkeypatch.setattr(tokenization, "_HELD_TOKENS", 500)
    monkeypatch.setattr(tokenization, "_READ_TOKENS", 100)


@pytest.fixture(scope="module")
def records(modules: list[str]) -> list[dict]:
    texts = [text[start : start + 300] for text in modules for start in range(0, 6000, 300)]
    return [
        {"id": f"d{i}", "text": text, "source": ("web", "书", "../up")[i % 3], "language": "en", "cluster": i,
         "score": i % 11 / 10, "weight": 0.5 + i % 4}
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def curated(records: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    (folder / "documents").mkdir()
    for index in range(2):
        table = pyarrow.Table.from_pylist(records[index * 80 : index * 80 + 80])
        pyarrow.parquet.write_table(table, folder / "documents" / f"{index}.parquet", row_group_size=16)
    return folder


@pytest.mark.usefixtures("many_units")
def test_each_part_has_its_documents_in_order(
    tokenizer: Tokenizer, curated: Path, records: list[dict], tmp_path: Path
) -> None:
    corpus = tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL)
    assert corpus == load_corpus(tmp_path / "rows")
    expected = collections.defaultdict(list)
    for record in records:
        level = weight_level(record["weight"], record["text"])
        expected[record["source"], min(int(record["score"] * 4), 3), level].append(record)
    assert [(part.source, part.bucket, part.mean_weight) for part in corpus.parts] == [
        (source, bucket, 2.0**level) for source, bucket, level in sorted(expected)
    ]
    names = {"web": "web", "书": "%E4%B9%A6", "../up": "%2E.%2Fup"}
    sums = 0.0
    for number, part in enumerate(corpus.parts):
        here = expected[part.source, part.bucket, int(math.log2(part.mean_weight))]
        assert part.path == f"{names[part.source]}/q{part.bucket}/w{part.mean_weight:g}"
        path = tmp_path / "rows" / part.path
        for split in ("train", "validation"):
            ids = [[*tokenizer.encode(record["text"]), 2] for record in here if split_of(record["text"], 0.2) == split]
            assert stream(path, split) == sum(ids, [])
            assert load_manifest(path).split(split).tokens == sum(map(len, ids))
        # Byte for byte what a corpus of this part alone holds.
        texts = [record["text"] for record in here]
        alone = pack_texts(texts, tokenizer, tmp_path / str(number), 32,
                               validation_fraction=0.2, rows_per_file=50)  # fmt: skip
        assert load_manifest(path) == alone
        train = [record for record in here if split_of(record["text"], 0.2) == "train"]
        assert (part.documents, part.tokens, part.rows) == (len(train), alone.train.tokens, alone.train.rows)
        assert (part.min_score, part.max_score) == (part.bucket / 4, part.bucket / 4 + 0.25)
        sums += part.tokens * part.mean_weight
    for part in corpus.parts:
        assert part.share == pytest.approx(part.tokens * part.mean_weight / sums)
    assert (corpus.documents, corpus.empty_documents, corpus.invalid_documents) == (160, 0, 0)
    for file in corpus.files:
        text = Path(file.path).read_bytes()
        assert (file.size, file.sha256) == (len(text), hashlib.sha256(text).hexdigest())
    assert not leftovers(tmp_path) and {path.name for path in (tmp_path / "rows").iterdir()} == {
        "corpus.json", *names.values()
    }  # fmt: skip


@pytest.mark.usefixtures("many_units")
def test_bytes_do_not_depend_on_the_number_of_processes(tokenizer: Tokenizer, curated: Path, tmp_path: Path) -> None:
    for processes in (1, 3):
        tokenize_corpus([curated], tokenizer.path, tmp_path / str(processes), SMALL, processes=processes)
    assert content(tmp_path / "1") == content(tmp_path / "3") and len(content(tmp_path / "1")) > 24


@pytest.mark.usefixtures("many_units")
def test_every_format_gives_the_same_rows(
    tokenizer: Tokenizer, curated: Path, records: list[dict], tmp_path: Path
) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    found = []
    for source in (curated, tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst"):
        out = tmp_path / f"rows of {source.name}"
        tokenize_corpus([source], tokenizer.path, out, SMALL)
        found.append(content(out))
        del found[-1]["corpus.json"]  # it names the files
    assert found[0] == found[1] == found[2]


def test_quality_is_cut_at_fixed_scores() -> None:
    assert [bucket_of(score, 4) for score in (0, 0.2499, 0.25, 0.5, 0.749, 0.75, 1)] == [0, 0, 1, 2, 2, 3, 3]
    assert {bucket_of(score / 10, 1) for score in range(11)} == {0}
    assert [bucket_of(index / 7, 7) for index in range(8)] == [0, 1, 2, 3, 4, 5, 6, 6]


@given(st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_the_expected_weight_is_the_weight(weight: float, seed: int) -> None:
    levels = [weight_level(weight, f"{seed} {index}") for index in range(400)]
    low = math.floor(math.log2(weight))
    assert set(levels) <= {low, low + 1}
    share = weight / 2.0**low - 1
    assert abs(np.mean([level > low for level in levels]) - share) < 5 * math.sqrt(share * (1 - share) / 400) + 1e-9


@pytest.mark.parametrize("weights", [(4.0, 0.25, 1.3), (0.25, 4.0, 1.3)])
def test_documents_are_read_as_often_as_their_weights_say(
    tokenizer: Tokenizer, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    """Counted in the order of a run, for documents of one source and one score."""
    texts = [f"#{i:02d}#" + " tree" * 40 for i in range(60)]
    rows = [{"text": text, "weight": weights[i % 3], "source": "s"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dataclasses.replace(SMALL, validation_fraction=0.0)
    tokenize_corpus([tmp_path / "a.jsonl"], tokenizer.path, tmp_path / "rows", settings)
    source = SourceConfig(path=str(tmp_path / "rows"))
    data = DataConfig(
        sources=(source,), tokenizer=str(tokenizer.path), sequence_length=32, global_batch_size=80
    )  # fmt: skip
    loader = make_train_loader(data, process_index=0, process_count=1, num_steps=20)
    read = [row for step in range(20) for row in loader[step]["input_ids"].tolist()]
    begun = collections.Counter(re.findall(r"#(\d\d)#", "\n".join(map(tokenizer.decode, read))))
    mean = [np.mean([begun[f"{i:02d}"] for i in range(first, 60, 3)]) for first in range(3)]
    assert sum(map(bool, begun.values())) > 50  # a number that two rows share is not seen
    np.testing.assert_allclose(np.array(mean) / sum(mean), np.array(weights) / sum(weights), rtol=0.2)


def test_names_of_sources_stay_in_the_corpus(tmp_path: Path) -> None:
    sources = ["web", "a b", "..", ".", "../..", "/etc/passwd", "a/b", "a%2Fb", "corpus.json", "problems.txt", "\0",
               "\n", "书", "x" * 300, "x" * 301, ".hidden", "%2Ehidden", " a", "C:\\x", "~"]  # fmt: skip
    names = [folder_name(source) for source in sources]
    assert len(set(names)) == len(names)
    for name in names:
        (tmp_path / name).mkdir()
        assert (tmp_path / name).parent == tmp_path and not name.startswith(".")
    assert names[:2] == ["web", "a b"] and not {"corpus.json", "problems.txt"} & set(names)


def test_a_source_is_all_parts_some_or_one(tokenizer: Tokenizer, curated: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    tokenize_corpus([curated], tokenizer.path, rows, SMALL)
    assert [part.path for part in list_parts(rows)] == [rows / part.path for part in load_corpus(rows).parts]
    for place, chosen in {
        "web": lambda part: part.source == "web",
        "web/q2": lambda part: (part.source, part.bucket) == ("web", 2),
        "web/q2/w2": lambda part: (part.source, part.bucket, part.mean_weight) == ("web", 2, 2),
    }.items():
        expected = [part for part in load_corpus(rows).parts if chosen(part)]
        assert expected and [(part.path, part.bucket, part.mean_weight) for part in list_parts(rows / place)] == [
            (rows / part.path, part.bucket, part.mean_weight) for part in expected
        ]
    with pytest.raises(FileNotFoundError, match=r"data.sources.path = .*wob' has no manifest.json"):
        list_parts(rows / "wob")


@pytest.mark.usefixtures("many_units")
def test_a_killed_run_goes_on(tokenizer: Tokenizer, curated: Path, tmp_path: Path) -> None:
    """A real process group dies at several moments; finished units are not made again."""
    tokenize_corpus([curated], tokenizer.path, tmp_path / "expected", SMALL)
    program = (
        "import os, sys, time\n"
        "from bc2_jax.data import tokenization as t\n"
        "t._UNIT_BYTES, t._HELD_TOKENS, t._READ_TOKENS = range(3000, 3001), 500, 100\n"
        "real = t._unit_file\n"
        "def slow(folder, index, suffix):\n"
        "    if suffix == 'tokens': time.sleep(0.05); print('unit', flush=True)\n"
        "    return real(folder, index, suffix)\n"
        "t._unit_file = slow\n"
        f"t.tokenize_corpus([{str(curated)!r}], {str(tokenizer.path)!r}, {str(tmp_path / 'rows')!r},\n"
        "    t.Settings(sequence_length=32, validation_fraction=0.2, rows_per_file=50))\n"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "unit\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "rows").exists()
    lock, work = sorted(leftovers(tmp_path), key=len)
    assert lock == ".rows.lock"
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / work / "units").glob("*.json")}
    assert len(finished) >= 4
    seen = {}

    def look(stage: str, done: int, total: int) -> None:
        seen.setdefault(stage, done / total)
        if stage == "packing":
            assert {path: path.stat().st_mtime_ns for path in finished} == finished

    tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL, advance=look)
    assert 0 < seen["tokenizing"] < 1
    assert content(tmp_path / "rows") == content(tmp_path / "expected") and not leftovers(tmp_path)


@pytest.mark.usefixtures("many_units")
def test_a_run_stopped_while_packing_goes_on(
    tokenizer: Tokenizer, curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_corpus([curated], tokenizer.path, tmp_path / "expected", SMALL)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "packing" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL, advance=stop)
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr(tokenization, "encode_texts", None)  # is not called again
    tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL)
    assert content(tmp_path / "rows") == content(tmp_path / "expected") and not leftovers(tmp_path)


def test_of_other_input_or_settings_nothing_is_used(tokenizer: Tokenizer, modules: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the first words"}\n{"text": "more"}\n')
    other = train_tokenizer(modules[:3], tmp_path / "other.model", 640)
    plain = dataclasses.replace(SMALL, validation_fraction=0.0)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "packing":
            raise KeyboardInterrupt

    def started(settings: Settings, model: Path) -> set[str]:
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus([file], model, tmp_path / "rows", settings, advance=stop)
        return set(leftovers(tmp_path))

    sizes = [len(started(plain, tokenizer.path)), len(started(plain, other.path))]
    for change in ({"sequence_length": 16}, {"quality_buckets": 2}, {"validation_fraction": 0.1},
                   {"fields": Fields(source="origin")}):  # fmt: skip
        sizes.append(len(started(dataclasses.replace(plain, **change), tokenizer.path)))
    file.write_text('{"text": "the other words"}\n{"text": "more"}\n')  # of the same size
    sizes.append(len(started(plain, tokenizer.path)))
    assert sizes == list(range(1, 8))
    tokenize_corpus([file], tokenizer.path, tmp_path / "rows", plain)
    (part,) = list_parts(tmp_path / "rows")
    ids = [*tokenizer.encode("the other words"), 2, *tokenizer.encode("more"), 2]
    assert stream(part.path) == ids and len(leftovers(tmp_path)) == 6


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import multiprocessing, time\n"
        "from bc2_jax.data.processes import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPool(2) as pool:\n"
        "        pool.run(int, ['1'], print)\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes {alive} live on")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_process_that_dies_is_one_sentence() -> None:
    with (
        pytest.raises(RuntimeError, match="A process died, perhaps for lack of memory; what is finished is kept"),
        ProcessPool(2) as pool,
    ):
        pool.run(os._exit, [1])


def test_all_kinds_of_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    lines = ["\ufeff" + json.dumps({"text": "first", "id": 1}), json.dumps({"text": "第二"}, ensure_ascii=False),
             "{not json", "", json.dumps({"text": ""}), json.dumps({"text": "high", "score": 0.2})]  # fmt: skip
    (corpus / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n' + b'{"text": "last"}')
    (corpus / "b.parquet").write_bytes(b"PAR1 and no more")
    (corpus / "deep" / "b.txt").write_bytes(b"one\r\ndocument\n")
    (corpus / "deep" / "c.txt").write_bytes(b"\xff\xfe")
    (corpus / "deep" / "ignored.md").write_text("not read")
    done = run(
        corpus, "--tokenizer", tokenizer.path, "--sequence-length", 8, "--out", tmp_path / "rows",
        "--validation-fraction", 0, "--processes", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path, texts in {
        "corpus/q3": ["first", "第二", "last"], "corpus/q0": ["high"], "deep/q3": ["one\r\ndocument\n"],
    }.items():  # fmt: skip
        assert stream(tmp_path / "rows" / path) == [i for text in texts for i in [*tokenizer.encode(text), 2]]
    found = load_corpus(tmp_path / "rows")
    assert (found.documents, found.empty_documents, found.invalid_documents) == (10, 1, 4)
    assert "10 documents read, 1 empty, 4 invalid (see " in done.stdout
    problems = (tmp_path / "rows" / "problems.txt").read_text().splitlines()
    assert len(problems) == 5
    for line, reason in zip(problems, (
        "b.parquet: the file is not a complete Parquet file (", "a.jsonl:3: the line is not JSON",
        "a.jsonl:7: the line is not UTF-8 (invalid start byte at byte 10)",
        "c.txt: the file is not UTF-8 (invalid start byte at byte 0)", "ignored.md: the file is not read",
    ), strict=True):  # fmt: skip
        assert reason in line and f"left out: {line}" in done.stderr


def test_another_field_no_buckets_and_existing_output(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "some words", "text": 1, "origin": "web", "score": 0.9}\n')
    arguments = (
        file, "--tokenizer", tokenizer.path, "--out", tmp_path / "rows", "--sequence-length", 4, "--processes", 1,
        "--text-field", "content", "--source-field", "origin", "--validation-fraction", 0, "--quality-buckets", 1,
    )  # fmt: skip
    assert run(*arguments).returncode == 0
    assert stream(tmp_path / "rows" / "web" / "q0") == [*tokenizer.encode("some words"), 2]
    again = run(*arguments)
    assert again.returncode == 1 and "it exists; choose another or pass overwrite" in again.stderr
    file.write_text('{"content": "others"}\n')
    assert run(*arguments, "--overwrite").returncode == 0
    assert stream(tmp_path / "rows" / tmp_path.name / "q0") == [*tokenizer.encode("others"), 2]
    assert not (tmp_path / "rows" / "web").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize(("fraction", "said"), [(0.0, "0 of 5"), (0.01, "0.01 of 5"), (0.999, None)])
def test_too_little_is_said_when_it_is_packed(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, fraction: float, said: str | None
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(5)))
    settings = dataclasses.replace(SMALL, validation_fraction=fraction)
    tokenize_corpus([tmp_path / "a.jsonl"], tokenizer.path, tmp_path / "rows", settings)
    held_out = f"no document is held out for validation ({said} documents): a training run, which evaluates, would not"
    message = "all documents are held out for validation: there is no row to train on" if said is None else held_out
    assert [record.getMessage()[: len(message)] for record in caplog.records] == [message]


def test_one_owner_of_a_corpus(tokenizer: Tokenizer, curated: Path, tmp_path: Path) -> None:
    def again(*_: object) -> None:
        with pytest.raises(OSError, match=rf"out_dir = '{tmp_path}/rows' is in use by process {os.getpid()} on "):
            tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL)

    tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL, advance=again)
    assert load_corpus(tmp_path / "rows").documents == 160 and not leftovers(tmp_path)


def test_a_signal_is_one_sentence(tokenizer: Tokenizer, records: list[dict], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 20))
    command = [sys.executable, str(TOOL), str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer.path), "--out",
               str(tmp_path / "rows"), "--processes", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not list(tmp_path.glob(".rows.*.incomplete/units")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "interrupted: what is finished is kept; run the same command to resume." in stderr
    assert run(*command[2:]).returncode == 0 and leftovers(tmp_path) == []


def test_what_appears_in_the_meantime_is_not_replaced(tokenizer: Tokenizer, curated: Path, tmp_path: Path) -> None:
    def interfere(stage: str, done: int, total: int) -> None:
        (tmp_path / "rows").mkdir(exist_ok=True)

    with pytest.raises(FileExistsError, match="it exists; choose another or pass overwrite"):
        tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL, advance=interfere)
    (tmp_path / "rows").rmdir()
    tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL)
    assert load_corpus(tmp_path / "rows").documents == 160


def test_overwrite_never_deletes_other_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="only a folder of packed rows can be overwritten"):
        tokenize_corpus([tmp_path], tokenizer.path, tmp_path, SMALL, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    out = tmp_path / "rows"
    tokenize_corpus([tmp_path / "thesis.txt"], tokenizer.path, out, SMALL)
    tokenize_corpus([tmp_path / "thesis.txt"], tokenizer.path, out, SMALL, overwrite=True)
    (part,) = list_parts(out)
    (part.path / "notes.md").write_text("more work")
    with pytest.raises(FileExistsError, match=r"it also has .*q3/notes.md, which packing did not write"):
        tokenize_corpus([tmp_path / "thesis.txt"], tokenizer.path, out, SMALL, overwrite=True)
    assert (part.path / "notes.md").read_text() == "more work"
    pack_texts(["text"], tokenizer, tmp_path / "alone", 8)  # rows without parts
    (tmp_path / "alone" / "notes.md").write_text("more work")
    with pytest.raises(FileExistsError, match=r"it also has notes.md, which packing did not write"):
        tokenize_corpus([tmp_path / "thesis.txt"], tokenizer.path, tmp_path / "alone", SMALL, overwrite=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "there is no such file or folder"),
        ("data.csv", "files must be .jsonl, .ndjson or .json (one object a line)"),
        ("empty.jsonl", "documents are not valid: none of the 1 has any text"),
    ],
)
def test_bad_inputs_are_one_line(tokenizer: Tokenizer, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    done = run(tmp_path / name, "--tokenizer", tokenizer.path, "--out", tmp_path / "rows", "--processes", 1)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "rows").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length = 0 is not valid: it must be positive"),
        ({"quality_buckets": 0}, "quality_buckets = 0 is not valid: it must be positive"),
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0 is not valid: it must be in \[0, 1\)"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("path", ["/tmp", "../other", "web/../../other", ""])
def test_a_corpus_leads_nowhere_else(tokenizer: Tokenizer, curated: Path, tmp_path: Path, path: str) -> None:
    tokenize_corpus([curated], tokenizer.path, tmp_path / "rows", SMALL)
    record = json.loads((tmp_path / "rows" / "corpus.json").read_text())
    record["parts"][0]["path"] = path
    (tmp_path / "rows" / "corpus.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="parts.path = .* is not valid: it must be a folder beside it"):
        list_parts(tmp_path / "rows")
