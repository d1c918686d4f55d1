"""Whole runs: bit-exact resume, refusals before anything is written, stopping at a loss that is not finite."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax import manifest
from bc2_jax.config import (
    CheckpointConfig,
    MeshConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)
from bc2_jax.convert.conversion import to_hf
from bc2_jax.convert.pretrained import load_params
from bc2_jax.data import row_batches
from bc2_jax.data.loader import make_train_loader, record_row_order
from bc2_jax.data.packing import load_manifest
from bc2_jax.metadata import read_metadata
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import loop, pretrain, replay
from bc2_jax.train.distributed import Preempted
from bc2_jax.train.metrics import fingerprint
from bc2_jax.train.metrics import read_metrics as read_every_line
from bc2_jax.train.milestones import list_milestones
from tests.packed_rows import pack_texts


def read_metrics(path):
    """Lines of training steps, without the evaluation before the first."""
    return [line for line in read_every_line(path) if line["step"] > 0]


@pytest.fixture(scope="module")
def config(small_run) -> TrainConfig:
    return small_run


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> loop.RunResult:
    return pretrain.train(dataclasses.replace(config, workdir=str(tmp_path_factory.mktemp("run") / "whole")))


@pytest.fixture(scope="module")
def half(config, tmp_path_factory) -> Path:
    """The folder of a run of the first 4 of its 8 steps; to be copied."""
    return pretrain.train(
        dataclasses.replace(config, workdir=str(tmp_path_factory.mktemp("half") / "run"), num_steps=4)
    ).workdir


def test_learns_and_writes_everything(config, finished):
    metrics = read_metrics(finished.workdir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["cross_entropy"] < metrics[0]["cross_entropy"] - 0.3
    before = read_every_line(finished.workdir / "metrics.jsonl")[0]
    assert before["step"] == 0
    # Unit rows against a normed input give logits of variance 1: ln V and a half.
    assert before["validation_cross_entropy"] == pytest.approx(np.log(640) + 0.5, abs=0.2)
    assert metrics[-1]["validation_cross_entropy"] == finished.metrics["validation_cross_entropy"]
    # All targets of the batches the loader gave: none lost, none twice.
    loader = make_train_loader(config.data, process_index=0, process_count=1)
    assert [m["tokens"] for m in metrics] == [(loader[i]["labels"] != -100).sum() for i in range(8)]
    assert (finished.workdir / "loss.png").stat().st_size > 1000
    assert list((finished.workdir / "tensorboard").iterdir())
    assert json.loads((finished.workdir / "config.json").read_text())["model"]["hidden_size"] == 32


@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_and_resumed_is_bit_identical(config, finished, stop, tmp_path, caplog):
    part = dataclasses.replace(config, workdir=str(tmp_path / "run"), num_steps=stop)
    pretrain.train(part)
    assert read_metadata(tmp_path / "run" / "checkpoints" / str(stop))["row_order"] == record_row_order(config.data)
    result = pretrain.train(dataclasses.replace(part, num_steps=8, resume="auto"))
    assert result.fingerprint == finished.fingerprint and not caplog.messages
    names = ("step", "loss", "grad_norm", "tokens")
    a, b = ([[m[n] for n in names] for m in read_metrics(r.workdir / "metrics.jsonl")] for r in (result, finished))
    assert a == b


def test_stopped_by_sigterm_and_resumed_is_bit_identical(config, finished, tmp_path, monkeypatch):
    show = loop.ProgressDisplay.show

    def send(self, step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, step, metrics)

    before = signal.getsignal(signal.SIGTERM)
    run = dataclasses.replace(config, workdir=str(tmp_path / "run"), resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(loop.ProgressDisplay, "show", send)
        # The step after the one whose metrics were shown had begun.
        with pytest.raises(Preempted, match="^Stopped by SIGTERM: step 3 is saved in .*; resume with --resume auto.$"):
            pretrain.train(run)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    result = pretrain.train(run)
    assert result.fingerprint == finished.fingerprint


def test_a_signal_during_an_evaluation_saves_at_once_and_the_evaluation_is_done_later(
    config, finished, tmp_path, monkeypatch
):
    """At a step that is evaluated and not saved otherwise; then Ctrl-C, during the evaluation of the last step."""
    run = dataclasses.replace(
        config, workdir=str(tmp_path / "run"), resume="auto", eval_every=3,
        checkpoint=CheckpointConfig(save_every=100, keep_last=9),
    )  # fmt: skip
    batch = row_batches.ValidationBatches.__getitem__
    calls = []

    def stopped(number: signal.Signals, at: int):
        def read(self, index):
            calls.append(index)
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return batch(self, index)

        calls.clear()
        return read

    with monkeypatch.context() as patch:
        whole = -(-load_manifest(Path(config.data.sources[0].path)).validation.rows // config.data.global_batch_size)
        assert whole > 1
        patch.setattr(row_batches.ValidationBatches, "__getitem__", stopped(signal.SIGTERM, whole + 1))
        with pytest.raises(Preempted, match="^Stopped by SIGTERM: step 3 is saved in") as stop:
            pretrain.train(run)
        assert stop.value.exit_code == 75 and len(calls) == whole + 1
        assert [m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
        # Resumed, the evaluation of step 3 comes first, then that of step 6 and that of the end.
        patch.setattr(row_batches.ValidationBatches, "__getitem__", stopped(signal.SIGINT, 2 * whole + 1))
        with pytest.raises(Preempted, match="^Stopped by Ctrl-C: step 8 is saved in") as stop:
            pretrain.train(run)
        assert stop.value.exit_code == 130
    result = pretrain.train(run)
    assert result.fingerprint == finished.fingerprint
    metrics = read_every_line(result.workdir / "metrics.jsonl")
    assert [m["step"] for m in metrics if "validation_loss" in m] == [0, 3, 6, 8]
    assert metrics[-1]["validation_loss"] == finished.metrics["validation_loss"] == result.metrics["validation_loss"]


def test_a_checkpoint_is_written_before_its_evaluation_begins(config, tmp_path, monkeypatch):
    run = dataclasses.replace(config, workdir=str(tmp_path / "run"), eval_every=4, num_steps=4)
    order = []
    save, evaluate = loop._Loop._save, loop._Loop._evaluate
    monkeypatch.setattr(loop._Loop, "_save", lambda self, *a: (order.append("save"), save(self, *a))[1])
    monkeypatch.setattr(loop._Loop, "_evaluate", lambda self, step: (order.append(step), evaluate(self, step))[1])
    pretrain.train(run)
    assert order == [0, "save", 4]


def test_a_resume_with_another_batch_counts_what_was_trained_on(config, half, tmp_path, capsys):
    workdir = shutil.copytree(half, tmp_path / "run")
    run = dataclasses.replace(config, workdir=str(workdir), num_steps=4)
    data = dataclasses.replace(config.data, global_batch_size=16)
    kept = CheckpointConfig(save_every=4, keep_last=1, keep_every_tokens=1536)
    more = dataclasses.replace(run, resume="auto", num_steps=8, data=data, checkpoint=kept)
    more = dataclasses.replace(more, optimizer=dataclasses.replace(run.optimizer, peak_learning_rate=5e-3))
    capsys.readouterr()
    pretrain.train(more)
    text = capsys.readouterr().out
    assert "Resumed at step 4, after 1,024 tokens," in text
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.count("│") == 5]
    assert [row for row in table if row[3] == "changes what is learnt"] == [
        ["data.global_batch_size", "8", "16", "changes what is learnt"],
        ["optimizer.peak_learning_rate", "0.01", "0.005", "changes what is learnt"],
    ]
    assert ["num_steps", "4", "8", "harmless"] in table
    metrics = read_metrics(workdir / "metrics.jsonl")
    assert [m["trained_tokens"] for m in metrics] == [256 * s for s in range(1, 5)] + [
        1024 + 512 * s for s in range(1, 5)
    ]
    assert [m["first_row"] for m in metrics] == [0, 8, 16, 24, 32, 48, 64, 80]
    single = dataclasses.replace(config.data, global_batch_size=1, accumulation_steps=1)
    loader = make_train_loader(single, process_index=0, process_count=1)
    targets = [(loader[i]["labels"] != -100).sum() for i in range(96)]
    assert [m["tokens"] for m in metrics] == [
        sum(targets[int(m["first_row"]) :][: 8 if m["step"] <= 4 else 16]) for m in metrics
    ]
    # 1,536 tokens are complete with step 5, 3,072 with step 8.
    found = list_milestones(workdir)
    assert [(m.step, m.tokens, m.permanent) for m in found] == [(5, 1536, True), (8, 3072, True)]
    again = list(replay.replay(workdir, 8))  # of rows that the steps before read in batches of another size
    assert [c.step for c in again] == [6, 7, 8] and not any(c.different for c in again)


def test_another_tokenizer_is_refused_unless_it_is_meant(config, finished, tokenizer, modules, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"\x12\x00")  # an empty message of its settings: other bytes
    documents = [part for module in modules for part in module.split("\n\n") if part]
    pack_texts(documents, Tokenizer(other), tmp_path / "rows", 32, validation_fraction=0.02)
    data = dataclasses.replace(
        config.data, tokenizer=str(other), sources=(SourceConfig(path=str(tmp_path / "rows")),)
    )  # fmt: skip
    run = dataclasses.replace(config, workdir=str(workdir), resume="auto", data=data, num_steps=9)
    sentence = "^data.tokenizer = '.*other.model' is not valid: its SHA-256 is .*set allow_other_tokenizer to use it"
    with pytest.raises(ValueError, match=sentence):
        pretrain.train(run)
    fresh = dataclasses.replace(run, workdir=str(tmp_path / "new"), resume="never", init_from=str(finished.workdir))
    with pytest.raises(ValueError, match=sentence):
        pretrain.train(fresh)
    assert (workdir / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes() and not (tmp_path / "new").exists()
    pretrain.train(dataclasses.replace(run, allow_other_tokenizer=True))
    assert (workdir / "tokenizer.model").read_bytes() == other.read_bytes()
    assert (workdir / "tokenizer_until_step_8.model").read_bytes() == tokenizer.path.read_bytes()


def test_names_with_special_characters_are_plain_names(config, finished, tokenizer, tmp_path):
    """Of the run's folder, of its rows and of its tokenizer; the last part and one above."""
    name = "exp%20a b#1 x:y;z=1,|'\"$& 実験"
    place = tmp_path / name / name
    rows = shutil.copytree(config.data.sources[0].path, place / "rows" / name)
    (place / "tokenizer").mkdir()
    shutil.copyfile(tokenizer.path, place / "tokenizer" / name)
    data = dataclasses.replace(
        config.data, tokenizer=str(place / "tokenizer" / name), sources=(SourceConfig(path=str(rows)),)
    )  # fmt: skip
    run = dataclasses.replace(config, workdir=str(place), data=data, num_steps=4)
    pretrain.train(run)
    result = pretrain.train(dataclasses.replace(run, num_steps=8, resume="auto", export_hf=True))
    assert result.fingerprint == finished.fingerprint == fingerprint(load_params(place / "hf")[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [name]


@pytest.mark.parametrize("name", ["exp[lr=1e-4]", "a*", "why?", "a\\b"])
def test_names_that_are_patterns_to_the_checkpoint_library_are_refused_before_anything_is_written(
    config, tmp_path, name
):
    for place in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(ValueError, match="^workdir = .* is not valid: the checkpoint library takes"):
            pretrain.train(dataclasses.replace(config, workdir=str(place)))
    assert list(tmp_path.iterdir()) == []


def test_samples_are_refused_before_the_first_step(config, tmp_path):
    for fields, message in (
        ({"max_new_tokens": 4096}, "sample.max_new_tokens = 4096 is not valid: with the [0-9]+ tokens of 'def '"),
    ):
        sample = SampleConfig(prompts=("def ",), **fields)
        with pytest.raises(ValueError, match=message):
            pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "run"), sample=sample))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_would_replace_something_else_is_refused_before_the_first_step(config, tmp_path):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="hf is not replaced, as no conversion wrote notes.txt"):
        pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "run"), export_hf=True))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["hf"]


def test_the_resume_that_is_verified_at_the_end_keeps_its_checkpoint(config, finished, tmp_path, capsys):
    run = dataclasses.replace(
        config, workdir=str(tmp_path / "run"), verify_resume_steps=5,
        checkpoint=CheckpointConfig(save_every=1, keep_last=1),
    )  # fmt: skip
    assert pretrain.train(run).fingerprint == finished.fingerprint
    assert "Resumed at step 3 and repeated: the parameters are the same bit for bit." in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["8"]


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, fsdp_inner=2, context=2)], ids=str)
def test_resumes_on_another_mesh(config, half, finished, tmp_path, mesh, capsys):
    """Also one that cuts sequences, on which it writes its samples too."""
    workdir = shutil.copytree(half, tmp_path / "run")
    sample = SampleConfig(prompts=("def ",), max_new_tokens=4)
    other = dataclasses.replace(config, workdir=str(workdir), resume="auto", mesh=mesh, sample=sample)
    result = pretrain.train(other)
    assert "--- 'def ' continues:" in capsys.readouterr().out
    metrics, whole = (read_metrics(r.workdir / "metrics.jsonl") for r in (result, finished))
    assert [m["tokens"] for m in metrics] == [m["tokens"] for m in whole]
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in whole], rtol=2e-3)


@pytest.mark.parametrize("form", ["run", "hf", "baichuan1"])
def test_starts_from_a_model(config, finished, form, tmp_path, capsys):
    path, model = finished.workdir, config.model
    if form != "run":
        path = tmp_path / "exported"
        layout = "baichuan2" if form == "hf" else form
        done = to_hf(finished.workdir, path, dtype="float32", layout=layout)
        assert (done.fingerprint == finished.fingerprint) == (form == "hf")
        model = dataclasses.replace(model, normalize_head=form == "hf")
    run = dataclasses.replace(
        config, model=model, init_from=str(path), workdir=str(tmp_path / "run"), num_steps=1,
        mesh=MeshConfig(fsdp=4, tensor=2),
    )  # fmt: skip
    result = pretrain.train(run)
    assert f"Parameters from {path}." in capsys.readouterr().out.replace("\n", "")
    before = read_every_line(result.workdir / "metrics.jsonl")[0]["validation_cross_entropy"]
    # Rows of unit length need no NormHead: the loss at the start is the same.
    assert before == pytest.approx(finished.metrics["validation_cross_entropy"], rel=2e-3)
    resumed = pretrain.train(
        dataclasses.replace(run, num_steps=2, resume="auto")
    )  # the saved state, not the model again
    assert resumed.step == 2


def test_flash_attention_is_for_tpu(config, tmp_path):
    compute = dataclasses.replace(config.compute, attention="flash")
    run = dataclasses.replace(config, compute=compute, workdir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="compute.attention = 'flash' is not valid on cpu: .* chunked and reference"):
        pretrain.train(run)
    assert list(tmp_path.iterdir()) == []


def test_init_from_another_architecture_is_refused(config, finished, tmp_path):
    model = dataclasses.replace(config.model, num_attention_heads=2, normalize_head=False, z_loss_weight=0.0)
    run = dataclasses.replace(config, model=model, init_from=str(finished.workdir), workdir=str(tmp_path / "run"))
    message = (
        r"another architecture; .*: model.num_attention_heads: 2 against 4; model.normalize_head: False against True"
    )
    with pytest.raises(ValueError, match=message):
        pretrain.train(run)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        pretrain.train(dataclasses.replace(run, init_from=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


def test_verifies_its_own_resume_exports_and_writes_text(config, finished, tmp_path, capsys):
    sample = SampleConfig(prompts=("def ",), max_new_tokens=4)
    full = dataclasses.replace(
        config,
        workdir=str(tmp_path / "run"),
        verify_resume_steps=2,
        export_hf=True,
        sample=sample,
        ngram_baselines=True,
    )  # fmt: skip
    result = pretrain.train(full)
    text = capsys.readouterr().out
    assert result.fingerprint == finished.fingerprint
    assert "Resumed at step 6 and repeated: the parameters are the same bit for bit." in text
    assert "'def ' continues:" in text and "bigram model" in text
    assert text.rstrip().endswith(f"step 8\nparameters sha256 {result.fingerprint}")
    from bc2_jax.convert.pretrained import load_pretrained

    ids = jnp.arange(8)[None]
    ours, exported = load_pretrained(result.workdir), load_pretrained(result.workdir / "hf")
    np.testing.assert_array_equal(ours(ids), exported(ids))


def test_a_finished_run_is_not_overwritten(config, finished):
    before = sorted(finished.workdir.rglob("*"))
    with pytest.raises(ValueError, match="already holds checkpoints up to step 8; pass --resume auto"):
        pretrain.train(dataclasses.replace(config, workdir=str(finished.workdir)))
    with pytest.raises(ValueError, match="model.*rms_norm_eps: 0.001 against 1e-06"):
        model = dataclasses.replace(config.model, rms_norm_eps=1e-3)
        pretrain.train(dataclasses.replace(config, model=model, workdir=str(finished.workdir), resume="auto"))
    with pytest.raises(ValueError, match="num_steps = 5 is not valid"):
        pretrain.train(dataclasses.replace(config, num_steps=5, workdir=str(finished.workdir), resume="auto"))
    assert sorted(finished.workdir.rglob("*")) == before


def test_a_tokenizer_larger_than_the_model_is_refused(config, tmp_path):
    model = dataclasses.replace(config.model, vocab_size=512)
    with pytest.raises(ValueError, match="model.vocab_size = 512 is not valid"):
        pretrain.train(dataclasses.replace(config, model=model, workdir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "config.json").exists()


def test_stops_at_a_loss_that_is_not_finite(config, tmp_path):
    # A learning rate that overflows fp32 in a few steps; the checkpoint before stays.
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=1e30, weight_decay=1e8)
    bad = dataclasses.replace(
        config, workdir=str(tmp_path), optimizer=optimizer, checkpoint=CheckpointConfig(save_every=1, keep_last=9)
    )
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d: the run stops"):
        pretrain.train(bad)
    for step in loop.Checkpointer(tmp_path / "checkpoints", bad.checkpoint).steps():
        assert all(np.isfinite(m["loss"]) for m in read_metrics(tmp_path / "metrics.jsonl") if m["step"] <= step)


def flip(folder):
    file = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_full_disk_and_a_flipped_bit_cost_time_but_no_bit(config, finished, tmp_path, monkeypatch, caplog):
    run = dataclasses.replace(
        config, workdir=str(tmp_path / "run"), resume="auto", checkpoint=CheckpointConfig(save_every=2, keep_last=9)
    )
    folder, seal = tmp_path / "run" / "checkpoints", manifest.write_manifest

    def full(path):
        if path.name.startswith("6."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return seal(path)

    monkeypatch.setattr(manifest, "write_manifest", full)
    message = f"{folder}/6 could not be saved .No space left on device.: the run stops; the last good .* is {folder}/4."
    with pytest.raises(OSError, match=message):
        pretrain.train(run)
    monkeypatch.undo()
    flip(folder / "4")
    result = pretrain.train(run)
    assert result.fingerprint == finished.fingerprint
    assert "is damaged" in caplog.text and "the newest good checkpoint is that of step 2." in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "4.aside", "6", "8"]


def test_the_environment_leaves_no_trace(config, tmp_path, monkeypatch, capfd):
    """Secrets are what programs and clusters put there; nothing that a run writes or prints has them."""
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD", "GOOGLE_APPLICATION_CREDENTIALS")
    for name in names:
        monkeypatch.setenv(name, f"secret-{name.lower()}-5e1c")
    pretrain.train(dataclasses.replace(config, workdir=str(tmp_path / "run"), num_steps=1, export_hf=True))
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 20
    texts = [p.read_bytes().lower() for p in files] + ["".join(capfd.readouterr()).lower().encode()]
    for name in names:
        assert not any(f"secret-{name.lower()}".encode() in text for text in texts)
        assert not any(name.lower().encode() in text for text in texts)


def test_nothing_is_compiled_after_the_second_step(config, tmp_path, monkeypatch):
    compiled: list[str] = []
    listening = []

    def listen(name: str, seconds: float, **_) -> None:
        if listening and ("backend_compile" in name or "cache_retrieval" in name):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    show = loop.ProgressDisplay.show

    def start_listening(self, step, metrics):
        if step == 2:
            listening.append(True)
        if step == 7:
            listening.clear()
        show(self, step, metrics)

    monkeypatch.setattr(loop.ProgressDisplay, "show", start_listening)
    pretrain.train(dataclasses.replace(config, workdir=str(tmp_path), checkpoint=CheckpointConfig(save_every=100)))
    assert not compiled


def test_compiled_programs_are_kept_where_the_config_or_the_environment_says(tmp_path):
    program = "import jax, sys; from bc2_jax.train.start import use_compilation_cache as use; use(sys.argv[1]);"
    program += "print(jax.config.values['jax_compilation_cache_dir'])"

    def folder(argument: str, **environment: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        command = [sys.executable, "-c", program, argument]
        return subprocess.check_output(command, env=inherited | environment, text=True).strip()

    assert folder("~/programs", HOME=str(tmp_path)) == str(tmp_path / "programs")
    assert folder("") == "None"
    assert folder("~/programs", JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"


def test_fingerprint_sees_every_bit_and_no_mesh(mesh_of, config):
    from bc2_jax.model.baichuan import init_params

    a, b = (init_params(config.model, 0, mesh_of(*shape)) for shape in ((2, 2, 2), (1, 1, 1)))
    assert fingerprint(a) == fingerprint(b)
    b["norm"]["weight"] = b["norm"]["weight"].at[3].multiply(1 + 2**-23)
    assert fingerprint(a) != fingerprint(b)
