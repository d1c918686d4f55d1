"""What a run tells about its data before it starts, and what stays of its metrics."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bc2_jax.config import DataConfig, MixtureStage, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.data.packing import load_manifest, pack_documents
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.metrics import MetricsWriter, read_metrics
from bc2_jax.train.results import print_mixture


def test_the_table_of_data_has_shares_and_epochs(tokenizer, modules, tmp_path):
    for name, texts in (("a", modules[:3]), ("b", modules[3:])):
        pack_documents(texts, tokenizer, tmp_path / name, 16, validation_fraction=0)
    rows = [load_manifest(tmp_path / name).train.rows for name in "ab"]
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "a"), weight=3.0), SourceConfig(path=str(tmp_path / "b"))),
        stages=(MixtureStage(start_tokens=1000, weights=(0.0, 1.0)),),
        tokenizer=str(tokenizer.path), sequence_length=16, global_batch_size=8,
    )  # fmt: skip
    model = ModelConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=640,
        position_embedding="rope",
    )  # fmt: skip
    config = TrainConfig(name="test", model=model, data=data, num_steps=100)
    console = Console(file=io.StringIO(), width=200)
    print_mixture(console, config)
    text = console.file.getvalue()
    assert "from step 8, 1,008 tokens" in text
    lines = [re.split(r"\s*[│|]\s*", line.strip())[1:-1] for line in text.splitlines() if str(tmp_path) in line]
    assert lines == [
        [str(tmp_path / "a"), f"{rows[0]:,}", "75.00%", "0.00%", f"{3 * 63 // 4 / rows[0]:.2f}"],
        [str(tmp_path / "b"), f"{rows[1]:,}", "25.00%", "100.00%", f"{(800 - 3 * 63 // 4) / rows[1]:.2f}"],
    ]
    without = dataclasses.replace(config, data=dataclasses.replace(data, stages=()))
    print_mixture(console, without)
    assert f"{600 / rows[0]:.2f}" in console.file.getvalue()


def test_a_kill_while_a_run_is_taken_up_again_loses_no_metrics(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, 0, Expendable())
    for step in range(1, 5):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    before = read_metrics(tmp_path / "metrics.jsonl")

    def killed_half_way(path: Path, text: str, **_: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed_half_way)
        MetricsWriter(tmp_path, 3, Expendable())
    assert read_metrics(tmp_path / "metrics.jsonl") == before
    MetricsWriter(tmp_path, 3, Expendable()).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == before[:3]
