from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa

from bc2_jax.curate.inputs import ReadConfig, plan_units
from bc2_jax.curate.problems import UnitReport
from bc2_jax.curate.reading import read_shards
from bc2_jax.data.text_files import find_text_files

SCHEMA = pa.schema(
    {
        "doc": pa.int64(), "id": pa.string(), "text": pa.large_string(), "source": pa.string(),
        "language": pa.string(), "h1": pa.int64(), "h2": pa.int64(),
    }
)  # fmt: skip


def read(folder: Path, **config) -> tuple[list[pa.Table], list[UnitReport]]:
    settings = ReadConfig(**config)
    tables, reports = [], []
    for unit in plan_units(find_text_files([str(folder)]).files, settings):
        reports.append(UnitReport(unit.index))
        tables += list(read_shards(unit, settings, reports[-1]))
    return tables, reports


def test_tables(tmp_path: Path):
    texts = ["hello\r\nworld ", "  \n\t", "hello\nworld", "", "中文。" * 9, "e\u0301"]
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": text, "language": ""}) + "\n" for text in texts))
    (tmp_path / "z.txt").write_text("hello\nworld")
    tables, reports = read(tmp_path)
    assert all(table.schema == SCHEMA for table in tables)
    first, second = (table.to_pydict() for table in tables)
    normal = ["hello\nworld", "hello\nworld", "中文。" * 9, "\u00e9"]
    assert first["text"] == normal
    assert first["doc"] == [0, 1, 2, 3] and second["doc"] == [1 << 32]
    assert first["language"][2] == "zh" and first["source"] == ["web"] * 4
    for text, h1, h2 in zip(normal, first["h1"], first["h2"], strict=True):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        assert (h1, h2) == tuple(int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8))
    assert (first["h1"][0], first["h2"][0]) == (second["h1"][0], second["h2"][0])
    report = reports[0]
    assert [(p.line, p.reason, p.rows) for p in report.problems] == [
        (2, "the text is empty", 1),
        (4, "the text is empty", 1),
    ]
    assert report.documents == 4 and report.languages["zh"] == 1
    assert report.raw_bytes == path.stat().st_size
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    assert report.normal_bytes == sum(len(text.encode()) for text in normal)


def test_shards_are_cut_by_size_and_repeatable(tmp_path: Path):
    rows = [{"text": f"{i} " + "x" * 1000, "id": i} for i in range(12_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables, _ = read(tmp_path, shard_bytes=1 << 20)
    assert len(tables) > 1 and all(table.nbytes >= 1 << 20 for table in tables[:-1])
    assert pa.concat_tables(tables)["id"].to_pylist() == [str(i) for i in range(12_000)]
    assert pa.concat_tables(tables)["doc"].to_pylist() == list(range(12_000))
    assert all(table["text"].num_chunks == 1 for table in tables)
    assert read(tmp_path, shard_bytes=1 << 20)[0] == tables


def test_a_unit_without_documents_gives_no_table(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "b.jsonl").write_text("")
    tables, reports = read(tmp_path)
    assert tables == []
    assert [problem.reason for report in reports for problem in report.problems] == [
        "the text is empty", "the file is empty"
    ]  # fmt: skip
