"""The table of the data at the start, and the metrics files."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bc2_jax.config import DataConfig, MixtureStage, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.data.packing import load_manifest
from bc2_jax.train import metrics
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.metrics import MetricsWriter, Throughput, read_metrics
from bc2_jax.train.results import print_mixture
from tests.packed_rows import pack_texts


def test_the_table_of_data_has_shares_and_epochs(tokenizer, modules, tmp_path):
    for name, texts in (("a", modules[:3]), ("b", modules[3:])):
        pack_texts(texts, tokenizer, tmp_path / name, 16, validation_fraction=0)
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


def test_lines_of_a_step_add_up_and_lines_that_are_none_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 2, "loss": 1.0}', '{"step": 1, "a": 1}', '{"step": 2, "validation_loss": 3.0, "loss": 2.0}']
    path.write_bytes(
        "\n".join([*lines, "{", "[1]", '{"step": "x"}', "", "\xff", "[" * 9999, '{"step": 3']).encode("latin-1")
    )
    expected = [{"step": 1, "a": 1}, {"step": 2, "loss": 2.0, "validation_loss": 3.0}]
    assert read_metrics(path) == expected
    assert caplog.messages == [f"{path}: line 4 and 4 more: not a record of metrics, ignored."]
    before = path.read_bytes()
    MetricsWriter(tmp_path, 2, Expendable()).close()
    assert read_metrics(path) == expected and len(caplog.messages) == 2
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_what_finds_no_room_is_counted_and_nothing_else_is_lost(tmp_path):
    expendable = Expendable()
    writer = MetricsWriter(tmp_path, 0, expendable)
    room = [None]  # for how many more bytes

    class Disk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if room[0] is None:
                return self.file.write(data)
            if room[0] == 0:
                raise OSError(28, "No space left on device")
            count = self.file.write(data[: room[0]])
            room[0] -= count
            return count

        def close(self):
            self.file.close()

    writer.write(1, {"loss": 1.0})
    writer._file = Disk(writer._file)
    room[0] = 7
    writer.write(2, {"loss": 2.0})
    writer.write(3, {"loss": 3.0})
    room[0] = None
    writer.write(4, {"loss": 4.0})
    writer.close()
    assert expendable.failures == {"metrics": 2}
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]


def test_a_killed_line_at_the_end_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    writer = MetricsWriter(tmp_path / "other", 0, Expendable())
    writer.path = tmp_path / "metrics.jsonl"  # as if it could not be written again at the start
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_tensorboard_reads_what_is_written_also_after_a_failure_and_a_rewind(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    def events() -> list[Event]:
        found = []
        for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
            data = path.read_bytes()
            while data:  # length, its CRC, the event, its CRC
                size = int.from_bytes(data[:8], "little")
                found.append(Event.FromString(data[12 : 12 + size]))
                data = data[16 + size :]
        return found

    (tmp_path / "tensorboard").touch()
    expendable = Expendable()
    writer = MetricsWriter(tmp_path, 0, expendable)
    writer.write(1, {"loss": 1.0, "accuracy": 0.5})
    (tmp_path / "tensorboard").unlink()
    writer.write(2, {"loss": 2.0})
    writer.close()
    again = MetricsWriter(tmp_path, 1, expendable)
    again.write(2, {"loss": 3.0})
    again.close()
    assert expendable.failures == {"tensorboard": 1}
    values = [(e.step, v.tag, v.simple_value) for e in events() for v in e.summary.value]
    assert values == [(2, "loss", 2.0), (2, "loss", 3.0)]
    purged = [e.step for e in events() if e.HasField("session_log")]
    assert purged == [1, 2]


def test_an_evaluation_is_left_out_of_the_time_of_the_step_after_it(mesh_of, monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    throughput = Throughput(600, 10**12, "all", mesh_of(1, 1, 1))
    now = 3.0
    assert throughput.step() == {"step_seconds": 3.0, "tflops_per_second": 1 / 3, "tokens_per_second": 200.0}
    now = 3.0 + 1.5 + 20.0  # half of the next step, then an evaluation
    throughput.leave_out(20.0)
    now += 0.5
    assert throughput.step()["step_seconds"] == 2.0
