"""Losses of runs and of tables: what is taken, warned of and refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bc2_jax.config import DataConfig, ModelConfig, OptimizerConfig, SourceConfig, TrainConfig
from bc2_jax.evaluate.scaling.collection import collect, read_points


def write_run(
    folder: Path, hidden: int = 32, loss: float | None = 4.5, done: int = 10, decay: int = 10, tokenizer: bytes = b"t",
    **last: Any,
) -> Path:  # fmt: skip
    """A run of 10 steps of 64 tokens, as the loop leaves it."""
    config = TrainConfig(
        name="x", num_steps=10,
        model=ModelConfig(
            hidden_size=hidden, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            position_embedding="rope", vocab_size=512, model_max_length=64,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "rows")),), tokenizer="t", sequence_length=32, global_batch_size=2
        ),
        optimizer=OptimizerConfig(decay_steps=decay, warmup_steps=1),
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    lines = [{"step": step, "loss": 5.0, "trained_tokens": 64.0 * step} for step in range(1, done + 1)]
    lines.append({"step": done, "validation_cross_entropy": loss, "validation_tokens": 1000.0} | last)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_by_compute(tmp_path: Path):
    large, small = write_run(tmp_path / "a", 64, 4.0), write_run(tmp_path / "b", 32, 4.5)
    found = collect([large, small])
    assert [point.name for point in found.points] == [str(small), str(large)]
    point = found.points[0]
    layers, head, attention = 2 * (4 * 32**2 + 3 * 32 * 96), 512 * 32, 2 * 32 * 33
    assert (point.loss, point.N, point.D) == (4.5, layers + head, 640)
    assert 6 * (layers + head + attention) * 640 == point.C
    assert (found.warnings, found.bits_per_byte) == ((), None)  # the rows are not there


def test_bits_a_byte_are_of_the_held_out_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = {"a": ("", 0), "b": ("abc", 3000), "c": ("abd", 3000)}  # of a the rows have been deleted
    monkeypatch.setattr(
        "bc2_jax.evaluate.scaling.collection._held_out_files",
        lambda config: kept[Path(config.data.sources[0].path).parent.name],
    )
    runs = [write_run(tmp_path / name, size) for name, size in (("a", 32), ("b", 64), ("c", 48))]
    found = collect(runs[:2])
    assert len(found.points) == 2
    assert found.bits_per_byte == pytest.approx(1000 / 3000 / math.log(2))
    with pytest.raises(ValueError, match=r"c and .*b are not evaluated on the same held-out text: .*\(abd\) and"):
        collect(runs)


def test_a_run_that_began_from_another_model_is_warned_of(tmp_path: Path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"init_from": "runs/base"}))
    (warning,) = collect([run]).warnings
    assert "it began from runs/base" in warning


def test_what_is_warned_of(tmp_path: Path):
    good = write_run(tmp_path / "good")
    stopped, early, blind = (
        write_run(tmp_path / "stopped", done=7), write_run(tmp_path / "early", 48, decay=100),
        write_run(tmp_path / "blind", 64, loss=math.nan),
    )  # fmt: skip
    found = collect([good, stopped, early, blind])
    assert [point.name for point in found.points] == [str(good), str(early)]
    texts = (
        "not finished, at step 7 of 10",
        "at step 100 and the run ends at 10",
        "no finite loss on held-out",
    )
    assert all(text in warning for text, warning in zip(texts, found.warnings, strict=True))
    with pytest.raises(ValueError, match="not finished"):
        collect([stopped])


def test_what_is_refused(tmp_path: Path):
    one = write_run(tmp_path / "one")
    with pytest.raises(ValueError, match="other and .*one have different tokenizers"):
        collect([one, write_run(tmp_path / "other", tokenizer=b"u")])
    with pytest.raises(ValueError, match="not evaluated on the same held-out text: 900 targets"):
        collect([one, write_run(tmp_path / "third", validation_tokens=900.0)])
    with pytest.raises(ValueError, match="given twice"):
        collect([one, tmp_path / "." / "one"])
    with pytest.raises(ValueError, match="no config.json"):
        collect([tmp_path])
    (one / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not the config of a run"):
        collect([one])


def test_a_table_of_points(tmp_path: Path):
    file = tmp_path / "points.csv"
    file.write_text("run,N,D,loss\r\nb-2,2e8,1e9,3.1\r\na-1,1e8,1e9,3.5\r\ngoal,1e9,1e10,2.5\r\n", encoding="utf-8-sig")
    points, compared = read_points(file, "^[ab]", "goal")
    assert [point.name for point in points.points] == ["a-1", "b-2"]
    assert points.points[0].C == 6e17
    assert [point.loss for point in compared] == [2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("N,D,loss\n1e8,x,3\n", r"p.csv, line 2: D = 'x'"),
        ("N,D,loss\n1e8,1e9,-3\n", "line 2: loss = '-3'"),
        ("N,D,loss\n1e8,1e9\n", "line 2: loss = None"),
        ("N,loss\n1e8,3\n", "must have loss, and N and D or C"),
        ("", "must have loss"),
        ("C,loss\n", "has no row"),
    ),
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points(tmp_path / "p.csv")


def test_a_bad_pattern_is_named(tmp_path: Path):
    (tmp_path / "p.csv").write_text("C,loss\n1e20,3\n")
    with pytest.raises(ValueError, match=r"--fit-on = '\('"):
        read_points(tmp_path / "p.csv", "(")
