"""tools/evaluate.py on a run that asked the same benchmarks meanwhile: curve, resume, refusals, comparison."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config import ComputeConfig, EvaluateConfig, MeshConfig, TrainConfig
from bc2_jax.infer import score
from bc2_jax.train import pretrain
from bc2_jax.train.loop import RunResult
from bc2_jax.train.metrics import read_metrics
from tests.evaluate.benchmark_files import write_ceval
from tests.train.conftest import small_run as small_run  # a fixture

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
main = runpy.run_path(str(TOOL))["main"]
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_ceval(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def run(small_run: TrainConfig, data, tmp_path_factory) -> RunResult:
    """Asked at step 0, at 8, a multiple of `every`, and at 6, which is kept for ever; not at 4."""
    config = dataclasses.replace(
        small_run, workdir=str(tmp_path_factory.mktemp("runs") / "run"), eval_every=2, eval_batches=1,
        compute=ComputeConfig(dtype="float32", attention="reference", remat="none", loss_chunk=32),
        mesh=MeshConfig(data=8), data=dataclasses.replace(small_run.data, accumulation_steps=1),
        checkpoint=dataclasses.replace(small_run.checkpoint, save_every=6, keep_every=6),
        evaluate=EvaluateConfig(tasks=("ceval",), data_dir=str(data), every=8, limit=10),
    )  # fmt: skip
    made, program = score.make_program.cache_info().misses, score.make_program()
    compiled = program._cache_size()
    result = pretrain.train(config)
    assert score.make_program.cache_info().misses - made <= 1
    assert program._cache_size() - compiled <= 2  # shapes of one evaluation, not of three
    return result


def evaluate(*args: object) -> int:
    return main([*map(str, args)])


@pytest.fixture(scope="module")
def curve(run, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curve") / "evals"
    assert (
        evaluate(run.workdir, "--checkpoints", "all", "--tasks", "ceval", "--data-dir", data, "--out", out, *MESH) == 0
    )
    return out


def test_a_run_asks_what_it_is_told_and_compiles_once(run):
    metrics = {m["step"]: m for m in read_metrics(run.workdir / "metrics.jsonl")}
    asked = [step for step, values in metrics.items() if "validation_ceval_accuracy" in values]
    assert asked == [0, 6, 8] and "validation_loss" in metrics[4]
    assert all(0 <= metrics[step]["validation_ceval_accuracy"] <= 1 for step in asked)
    assert 5 < metrics[0]["validation_ceval_gold_nats"] < 10  # about ln 640


def test_the_curve_is_what_the_run_saw(run, curve, capsys):
    points = json.loads((curve / "curve.json").read_text())
    assert [point["step"] for point in points] == [6, 8] and all(point["tokens"] for point in points)
    assert (curve / "curve.png").stat().st_size > 5000
    seen = {m["step"]: m for m in read_metrics(run.workdir / "metrics.jsonl")}
    for step in (6, 8):
        records = [json.loads(line) for line in (curve / f"step_{step}" / "ceval" / "records.jsonl").open()]
        assert len(records) == 12
        chosen = [r for r in records if not r["id"].endswith("/5")]  # the first five of each subject
        nats = -np.mean([r["log_probs"][r["gold"][0]] for r in chosen])
        assert seen[step]["validation_ceval_gold_nats"] == pytest.approx(nats, abs=1e-4)
        share = np.mean([r["right"]["as_shown"] for r in chosen])
        assert seen[step]["validation_ceval_accuracy"] == pytest.approx(share)


def test_the_same_command_resumes_and_others_are_refused(run, data, curve, tmp_path, capsys, monkeypatch):
    common = ("--tasks", "ceval", "--data-dir", data, *MESH)
    folder = curve / "step_8"
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    records = folder / "ceval" / "records.jsonl"
    records.write_bytes(records.read_bytes()[:-100])
    assert evaluate(run.workdir, *common, "--out", folder, "--records", "parquet") == 0
    out = capsys.readouterr().out
    assert "C-Eval (val): 12 items" in out and "54.00" in out and "paper 13B" in out and "test split" in out
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    assert (folder / "ceval" / "records.parquet").is_file()
    # The same folder may hold results of lm-eval and of checkpoints, which are not benchmarks.
    for other in ("lm_eval", "step_6"):
        (folder / other).mkdir()
        (folder / other / "results.json").write_text('{"tasks": {}}')
    with monkeypatch.context() as patch:  # all is known: no weights are read
        patch.setattr("bc2_jax.evaluate.evaluation.load_pretrained", None)
        assert evaluate(run.workdir, *common, "--out", folder) == 0
    for other in ("lm_eval", "step_6"):
        shutil.rmtree(folder / other)
    other = run.workdir / "checkpoints" / "6"
    for args, message in (
        ((other, *common, "--out", folder), "results of another model"),
        ((run.workdir, *common, "--dtype", "bfloat16", "--out", folder), "another dtype"),
        ((run.workdir, *common, "--shots", 2, "--out", folder), "other prompts of ceval .5 shots, now 2."),
        (
            (run.workdir, "--checkpoints", 6, *common, "--shots", 2, "--out", curve),
            "step_6 has records of other prompts",
        ),
    ):
        capsys.readouterr()
        assert evaluate(*args) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and re.search(message, error), error
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_two_models_are_compared(curve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "compared"
    assert evaluate("--compare", curve / "step_6", curve / "step_8", "--out", out) == 0
    shown = capsys.readouterr().out
    (found,) = json.loads((out / "compare.json").read_text())["tasks"]
    assert found["items"] == 12 and found["low"] <= found["difference"] <= found["high"]
    assert "95 % interval" in shown


@pytest.mark.parametrize(
    "args, message",
    [
        (["MODEL"], "one of --tasks, --lm-eval, --compare and --list says what to do: none is"),
        (["MODEL", "--tasks", "ceval"], "--tasks needs --data-dir"),
        (["--tasks", "ceval", "--data-dir", "x"], "--tasks needs a MODEL"),
        (["MODEL", "--list"], "--list needs no MODEL"),
        (["MODEL", "--lm-eval", "x", "--data-dir", "y"], "--data-dir goes with --tasks, not with --lm-eval"),
        (["--compare", "A", "B", "--limit", "3"], "--limit goes with --tasks and --lm-eval, not with --compare"),
        (["--compare", "A", "B", "--mesh.data", "2"], "--mesh.data goes with --tasks and --lm-eval"),
        (["MODEL", "--tasks", ",", "--data-dir", "x"], "tasks = '' is not valid: it must name at least one benchmark"),
        (["MODEL", "--tasks", "ceval", "--data-dir", "x", "--rows", "-1"], "--rows = -1 is not valid"),
        (["MODEL", "--tasks", "ceval", "--data-dir", "x", "--max-length", "0"], "--max-length = 0 is not valid"),
        (["MODEL", "--tasks", "ceval", "--data-dir", "x", "--threshold", "1"], "--threshold is that of a --judge"),
        (["MODEL", "--tasks", "cevla", "--data-dir", "x"], "There is no task 'cevla'. Did you mean 'ceval'"),
        (["MODEL", "--tasks", "ceval,mmlu", "--data-dir", "x"], "\nmmlu: x is not a folder"),
        (["MODEL", "--checkpoints", "2,9", "--tasks", "ceval", "--data-dir", "x"], "it has no checkpoints/STEP"),
    ],
)
def test_what_cannot_be_is_one_sentence(args, message, tmp_path, capsys):
    args = [str(tmp_path) if arg == "MODEL" else arg for arg in args]
    assert evaluate(*args, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_answers_without_jax_and_list_says_what_is_needed(capsys):
    code = (
        f"import runpy, sys\nmain = runpy.run_path({str(TOOL)!r})['main']\ntry:\n  main(['--help'])\n"
        "except SystemExit:\n  assert 'jax' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--mesh.tensor" in out and "--checkpoints" in out
    assert evaluate("--list") == 0
    out = capsys.readouterr().out
    assert "ceval: C-Eval" in out and "gsm8k" in out and "DATA_DIR" in out
