"""Records as other programs read them."""

from __future__ import annotations

from pyarrow import parquet

from bc2_jax.evaluate.asking import ask
from bc2_jax.evaluate.records import judged_of, write_parquet
from tests.evaluate.fakes import FakeScorer, letters, task_of, to_write


def test_parquet_has_the_same(tokenizer, tmp_path):
    examples = letters(5)
    records = ask(task_of(examples), examples, FakeScorer(tokenizer))
    write_parquet(tmp_path / "r.parquet", records)
    rows = parquet.read_table(tmp_path / "r.parquet").to_pylist()
    for row, record in zip(rows, records, strict=True):
        for name in ("answers", "right"):
            assert {way: row.pop(f"{name}_{way}") for way in ("as_shown", "bare")} == record[name]
        assert row == {name: value for name, value in record.items() if name not in ("answers", "right")}


def test_the_way_that_leads(tokenizer):
    examples = letters(5)
    for example, record in zip(examples, ask(task_of(examples), examples, FakeScorer(tokenizer)), strict=True):
        for letter in ("as_shown", "bare"):
            judged = judged_of(example, record, letter)
            assert next(iter(judged.right)) == letter and judged.answer == record["answers"][letter]
            assert judged.right == record["right"]
    task = to_write(2)
    examples = task.load(None).examples
    for example, record in zip(examples, ask(task, examples, FakeScorer(tokenizer)), strict=True):
        judged = judged_of(example, record, "bare")
        assert judged.right == record["right"] and judged.answer == judged.text.strip()
