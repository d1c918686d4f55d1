"""Whole runs of reinforcement learning: what is learned, what a checkpoint holds, stops and kills at any phase."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bc2_jax.align import rl, shaping
from bc2_jax.align.experience import Rollouts
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import LoraConfig, MeshConfig, RLConfig
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.convert.reward import load_critic, load_reward_model
from bc2_jax.sharding import make_mesh
from bc2_jax.train import distributed, loop
from bc2_jax.train.loop import RunResult
from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.start import LOCK_NAME
from tests.align.rl_models import write_models
from tests.faults import harness

replay = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "replay.py"))["main"]
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def config(small_tokenizer, tmp_path_factory) -> RLConfig:
    return write_models(tmp_path_factory.mktemp("rl"), small_tokenizer, make_mesh(MeshConfig()))


def change(config: RLConfig, **ppo) -> RLConfig:
    return dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **ppo))


def grpo_of(config: RLConfig) -> RLConfig:
    """Adapters, no critic, rewards of a function alone, a coefficient that follows the KL."""
    changed = change(config, algorithm="grpo", reward_model=None, kl_schedule="adaptive", kl_horizon=16.0,
                     normalize_rewards=True, reduction="grpo", epochs=1)  # fmt: skip
    return dataclasses.replace(changed, lora=LORA)


def run(config: RLConfig, workdir: Path, **changes) -> RunResult:
    return rl.train(dataclasses.replace(config, workdir=str(workdir), resume="auto", **changes))


@pytest.fixture(scope="module")
def ppo(config, tmp_path_factory) -> RunResult:
    """Its last iteration was done twice (verify_resume_steps)."""
    return run(config, tmp_path_factory.mktemp("ppo") / "run")


@pytest.fixture(scope="module")
def grpo(config, tmp_path_factory) -> RunResult:
    return run(grpo_of(config), tmp_path_factory.mktemp("grpo") / "run")


def metrics_of(result: RunResult) -> list[dict]:
    return [m for m in read_metrics(result.workdir / "metrics.jsonl") if "loss" in m]


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_the_critic_learns_first_and_then_both(config, ppo):
    first, later = (ppo.workdir / "checkpoints" / str(step) for step in (1, 3))
    chat, mine = load_params(str(config.init_from))[0], load_params(first)[0]
    jax.tree.map(np.testing.assert_array_equal, mine, chat)
    assert any((a != b).any() for a, b in zip(leaves(load_params(later)[0]), leaves(chat), strict=True))
    reward = load_reward_model(config.ppo.reward_model)[0]
    values = load_critic(first)[0]
    assert all((a != b).any() for a, b in zip(leaves(values), leaves(reward), strict=True))
    assert find_model(ppo.workdir).config == config.model  # the actor is what a run holds


def test_what_an_iteration_tells(config, ppo, grpo):
    for result in (ppo, grpo):
        metrics = metrics_of(result)
        assert [m["step"] for m in metrics] == [1, 2, 3]
        assert all(m["first_log_ratio"] < 1e-5 and m["sampler_distance"] < 1e-4 for m in metrics)
        assert abs(metrics[0]["kl"]) < 1e-6 < abs(metrics[2]["kl"])
        assert all(0 < m["share_cut"] < 1 and m["kl_k3"] >= 0 for m in metrics)
        parts = [[m[f"{name}_seconds"] for name in ("rollout", "scoring", "update")] for m in metrics]
        assert all(min(seconds) > 0 for seconds in parts)
        # The rollout of the first step is made before steps are timed.
        for m, seconds in zip(metrics[1:], parts[1:], strict=True):
            assert sum(seconds) * 0.9 < m["step_seconds"] < sum(seconds) + 3
        assert all(0 < m["rollout_efficiency"] <= 1 for m in metrics)
        lines = [json.loads(line) for line in (result.workdir / "rollouts" / "step_2.jsonl").open()]
        asked = [line["messages"][-1]["content"] for line in lines]
        assert len(asked) == 16 and all(len(set(asked[i : i + 4])) == 1 for i in range(0, 16, 4))
        assert np.mean([line["score"] for line in lines]) == pytest.approx(metrics[1]["reward"], abs=1e-5)
        for line in lines:
            assert line["score"] == pytest.approx(sum(line["parts"].values()), abs=1e-5)
            assert line["parts"]["cut"] == -line["cut"]
            letters = line["answer"]
            assert line["parts"]["reward"] == pytest.approx(letters.count("t") / max(len(letters), 1), abs=1e-5)
        assert (result.workdir / "rl.png").stat().st_size > 10_000
    first, second, third = (m["kl_coefficient"] for m in metrics_of(ppo))
    assert first == pytest.approx(0.2) and second / first == pytest.approx(third / second)
    assert {"explained_variance", "value_loss", "reward_model"} <= metrics_of(ppo)[0].keys()
    assert metrics_of(grpo)[0]["groups_equal"] < 1 and "value_loss" not in metrics_of(grpo)[0]
    # The controller moved the coefficient once there was a KL.
    assert metrics_of(grpo)[2]["kl_coefficient"] != metrics_of(grpo)[1]["kl_coefficient"]


def test_an_iteration_is_identical_when_it_is_done_again(grpo, capsys):
    assert replay([str(grpo.workdir), "--step", "3"]) == 0
    out = capsys.readouterr().out
    assert "identical" in out and "parameters sha256" in out
    assert replay([str(grpo.workdir), "--step", "3", "--batch", "nowhere.npz"]) == 2


def test_a_run_goes_on_with_its_own_seed(config, grpo):
    with pytest.raises(ValueError, match="seed = 5 is not valid: prompts and sampling depend on it"):
        run(grpo_of(config), grpo.workdir, seed=5, num_steps=9, verify_resume_steps=0)


class Killed(BaseException):
    """Nothing catches it: what is not on disk is gone."""


def test_a_kill_in_any_phase_changes_nothing(config, grpo, tmp_path, monkeypatch):
    """Each start ends in another phase of an iteration; the last one finishes."""
    changed = dataclasses.replace(grpo_of(config), verify_resume_steps=0)
    phases = [("answer", 2), ("scores", 2), ("log-probabilities", 3), ("update", 3), ("save", 3)]
    for phase, step in phases:
        with monkeypatch.context() as patch:
            if phase == "update":
                check = rl.check_ratio

                def kill_in_update(config, number, metrics, check=check, step=step):
                    check(config, number, metrics)
                    if number == step:
                        raise Killed

                patch.setattr(rl, "check_ratio", kill_in_update)
            elif phase == "save":
                save = Checkpointer.save

                def kill_in_save(self, number, *args, save=save, step=step):
                    if number == step:
                        raise Killed
                    save(self, number, *args)

                patch.setattr(Checkpointer, "save", kill_in_save)
            else:
                go_on = distributed.make_progress

                def make(*args, go_on=go_on, phase=phase, step=step):
                    progress = go_on(*args)

                    def kill(done: str) -> bool:
                        if phase in done and done.endswith(f"step {step}"):
                            raise Killed
                        return progress(done)

                    return kill

                patch.setattr(distributed, "make_progress", make)
            with pytest.raises(Killed):
                run(changed, tmp_path / "run")
    result = run(changed, tmp_path / "run")
    assert result.fingerprint == grpo.fingerprint
    timeless = [{k: v for k, v in m.items() if not k.endswith("_seconds") and "second" not in k and k != "goodput"}
                for m in (metrics_of(result)[-1], metrics_of(grpo)[-1])]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_sigterm_in_a_rollout_costs_nothing_that_was_learned(config, ppo, tmp_path, monkeypatch):
    rare = dataclasses.replace(config.checkpoint, save_every=100)
    changed = dataclasses.replace(config, checkpoint=rare, verify_resume_steps=0)
    go_on = distributed.make_progress

    def make(*args):
        progress = go_on(*args)

        def stop(done: str) -> bool:
            if done.startswith("answer") and done.endswith("step 3"):
                os.kill(os.getpid(), signal.SIGTERM)
            return progress(done)

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "make_progress", make)
        with pytest.raises(distributed.Preempted, match="Stopped by SIGTERM: step 2 is saved"):
            run(changed, tmp_path / "run")
    assert run(changed, tmp_path / "run").fingerprint == ppo.fingerprint


def test_kill_minus_nine_in_a_save(config, ppo, tmp_path):
    """Another process, killed while the arrays of its second iteration are written."""
    program = tmp_path / "killed.py"
    folder = Path(config.init_from).parent
    program.write_text(
        f"""
import os, signal
from bc2_jax.sharding import use_cpu_devices
use_cpu_devices(8)
from bc2_jax import manifest
from bc2_jax.align import rl
from bc2_jax.config.record import from_record
from bc2_jax.config import RLConfig
import json
write = manifest.write_manifest
def kill(folder, *args, **kwargs):
    if folder.name.split(".")[0] == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, *args, **kwargs)
manifest.write_manifest = kill
record = json.loads(open({str(folder / "config.json")!r}).read())
rl.train(from_record(RLConfig, record))
"""
    )
    changed = dataclasses.replace(config, workdir=str(tmp_path / "run"), resume="auto", verify_resume_steps=0)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(changed)))
    killed = subprocess.run([sys.executable, str(program)], env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]")] == ["1"]
    assert run(changed, tmp_path / "run").fingerprint == ppo.fingerprint


def test_sharded_equals_unsharded(config, ppo, grpo, tmp_path):
    """Two iterations on one device: what differs is rounding."""
    one = MeshConfig(num_cpu_devices=0, data=1, fsdp=1)
    for whole, changed in ((ppo, config), (grpo, grpo_of(config))):
        single = dataclasses.replace(changed, num_steps=2, verify_resume_steps=0, mesh=one)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
            patch.setattr(jax, "device_count", lambda: 1)
            found = metrics_of(run(single, tmp_path / changed.ppo.algorithm))
        for a, b in zip(found, metrics_of(whole), strict=False):
            for name in ("batch_checksum_of_rows", "loss", "grad_norm", "reward", "kl", "entropy", "param_norm"):
                if name in a:
                    assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


def test_two_processes_do_what_one_does(config, grpo, tmp_path):
    """One gets SIGTERM, and both stop; they go on together, with the same answers and rewards."""
    changed = dataclasses.replace(grpo_of(config), verify_resume_steps=0, mesh=MeshConfig())
    program = (
        "import json\nfrom bc2_jax.config import RLConfig\nfrom bc2_jax.config.record import from_record\n\n\n"
        f"def config():\n    return from_record(RLConfig, json.loads({json.dumps(dataclasses.asdict(changed))!r}))\n"
    )
    (tmp_path / "tiny.py").write_text(program)
    both = harness.launch(tmp_path / "tiny.py", tmp_path / "two", processes=2, devices=2)
    both.wait_for_step(1)
    both.send(signal.SIGTERM, process=1)
    codes = both.wait()
    assert codes == [distributed.EXIT_PREEMPTED] * 2 or codes == [0, 0], both.text()
    again = harness.launch(tmp_path / "tiny.py", tmp_path / "two", processes=2, devices=2)
    assert again.wait() == [0, 0], again.text()
    found = [m for m in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in m]
    for a, b in zip(found, metrics_of(grpo), strict=True):
        for name in ("reward", "kl", "entropy", "answer_tokens", "loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


WRONG = [
    ({"prompts": ()}, r"ppo.prompts = \(\) is not valid: at least one file"),
    ({"reward_model": None, "reward_functions": ()}, "ppo.reward_model = None is not valid: a reward model or"),
    ({"minibatches": 3}, r"ppo.minibatches = 3 .* must divide .* = 16; legal values are 1, 2, 4, 8, 16"),
    ({"accumulation_steps": 3}, "ppo.accumulation_steps = 3 .* the 8 answers of a minibatch; legal values"),
    ({"prompts_per_step": 5, "minibatches": 10}, "ppo.prompts_per_step = 5 .* must be a multiple of mesh.data"),
    ({"rollout_rows": 6}, "ppo.rollout_rows = 6 .* must be a multiple of mesh.data"),
    ({"algorithm": "grpo", "answers_per_prompt": 1, "prompts_per_step": 16}, "grpo compares the answers to a prompt"),
    ({"max_new_tokens": 50}, "with ppo.max_prompt_tokens = 20 it must be at most model.model_max_length = 64"),
    ({"critic_warmup_steps": 3}, "ppo.critic_warmup_steps = 3 .* less than num_steps = 3"),
    ({"reward_functions": ("nowhere.py:f",)}, "there is no file 'nowhere.py'"),
    ({"reward_model": "CHAT"}, "is a language model, not a reward model"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: next(iter(value), "") if value else "")
def test_what_cannot_be_is_told_before_anything_is_written(config, tmp_path, changes, message):
    if changes.get("reward_model") == "CHAT":
        changes = {"reward_model": config.init_from}
    with pytest.raises(ValueError, match=message):
        run(change(config, **changes), tmp_path / "run")
    assert not [path for path in tmp_path.glob("run/*") if path.name != LOCK_NAME]


BROKEN = {
    "ratio": "the ratio of new and old probability is not 1",
    "reference": "before the first update the actor must equal the reference",
    "reward": "rewards must be finite",
    "equal": r"all scores that are compared are equal, 2 iterations in a row \(ppo.patience = 2\)",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_stops_the_run(what, config, tmp_path, monkeypatch):
    changed = dataclasses.replace(grpo_of(config), num_steps=2, verify_resume_steps=0)
    forward, score = Rollouts._forward, Rollouts._score

    def spoil(self, *args):
        found = forward(self, *args)
        other = found[shaping.OLD] * np.float32(1.01)
        return found | {shaping.REFERENCE: other} | ({shaping.OLD: other} if what == "ratio" else {})

    if what in ("ratio", "reference"):
        monkeypatch.setattr(Rollouts, "_forward", spoil)
    elif what == "reward":
        changed = change(changed, reward_model=config.ppo.reward_model, reward_model_weight=1e39)
    else:
        changed = dataclasses.replace(
            change(changed, patience=2), checkpoint=dataclasses.replace(config.checkpoint, save_every=100)
        )
        monkeypatch.setattr(
            Rollouts, "_score", lambda self, *args: (s := score(self, *args))._replace(total=np.zeros_like(s.total))
        )
    with pytest.raises(ArithmeticError, match=BROKEN[what]):
        run(changed, tmp_path / "run")
    # What was learned before is kept.
    assert len(list(tmp_path.glob("run/checkpoints/1"))) == (what == "equal")
