"""Checks of the hardware on the CPU: what is wrong is found, and figures are bytes and FLOPs over seconds."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.cli import aot_compile, check_hardware
from bc2_jax.hardware import golden, kernels, rates, report, timing
from bc2_jax.hardware.device import Device, find_device, topology_of
from bc2_jax.hardware.results import Line, Outcome
from bc2_jax.kernels.flash import flash_attention
from bc2_jax.tpu.chips import CHIPS, parse_topology
from bc2_jax.tpu.rates import read_rates
from tests.conftest import Golden

CPU = Device("cpu", "cpu", None, 2**31, 1)
FAKED_V5E = Device("cpu", "TPU v5 lite", CHIPS["v5e"], 2**31, 1)


def test_a_broken_kernel_is_reported(monkeypatch: pytest.MonkeyPatch):
    """One entry of one gradient is wrong, and one case raises an exception."""

    @jax.custom_vjp
    def breaks(x):
        return x

    breaks.defvjp(lambda x: (x, None), lambda _, d: (d.at[0, 7, 0, 0].add(0.05),))

    def broken(q, k, v, *args, **kwargs):
        return flash_attention(q, breaks(k), v, *args, **kwargs)

    def raises():
        raise ZeroDivisionError

    case = kernels.list_cases(CPU)[0]
    raising = kernels.Case("raising", "float32", raises)
    monkeypatch.setattr(kernels, "flash_attention", broken)
    monkeypatch.setattr(kernels, "list_cases", lambda device: [case, raising])
    outcome = kernels.check_kernels(CPU)
    assert outcome.status == "wrong"
    assert "dk is off by" in outcome.text and "raising raises ZeroDivisionError" in outcome.text
    assert "dv is off" not in outcome.text and "forward is off" not in outcome.text
    assert kernels.check_kernels(CPU, has_time=lambda: False).status == "skipped"


def test_the_numpy_model_has_the_logits_of_pytorch(golden: Golden):
    """The reference of check_models, on weights whose logits PyTorch computed."""
    from bc2_jax.hardware.golden import numpy_logits

    leaves = jax.tree_util.tree_leaves_with_path(golden.params)
    weights = {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x, np.float64) for p, x in leaves}
    logits = numpy_logits(golden.config, weights, golden.arrays["input_ids"])
    np.testing.assert_allclose(logits, golden.arrays["train_logits"], atol=2e-5)


def test_a_wrong_model_is_reported(monkeypatch: pytest.MonkeyPatch):
    found = {"logits": 1e-6, "loss": float("nan"), "gradient": 5e-4}
    monkeypatch.setattr(golden, "compare", lambda model, compute: found)
    outcome = golden.check_models(CPU)
    assert outcome.status == "wrong"
    assert "rope float32: loss is off by nan" in outcome.text and "logits" not in outcome.text


def test_rates_are_work_over_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """And a report on a chip that the estimate knows is what --calibrate takes."""
    monkeypatch.setattr(rates, "seconds_per_pass", lambda *args, **kwargs: 1e-3)
    monkeypatch.setattr(rates, "seconds_of_calls", lambda call: [2e-3, 1e-3, 4e-3])
    found = report.Report(FAKED_V5E)
    found.outcomes["matmuls"] = rates.measure_matmuls(FAKED_V5E)
    found.outcomes["memory"] = rates.measure_memory(FAKED_V5E)
    found.outcomes["host"] = rates.measure_host(FAKED_V5E)
    values = {line.name.split(" ")[0]: line.measured for line in found.lines}
    assert values["matmul"] == pytest.approx(2 * 2 * 64 * 64 * 128 / 1e-3 / 1e12)
    assert values["memory,"] == pytest.approx(2 * 8 * 2**20 / 1e-3 / 1e9)
    assert values["to"] == values["from"] == pytest.approx(4 * 2**20 / 2e-3 / 1e9)
    assert "rates.hbm_share" in " ".join(found.sentences)
    path = tmp_path / "report.json"
    found.save(path)
    read = read_rates(path, CHIPS["v5e"])
    assert set(read.measured) == {"matmul_share", "hbm_share", "host_bandwidth"}
    assert read.hbm_share == pytest.approx(2 * 8 * 2**20 / 1e-3 / 819e9)
    args = argparse.Namespace(calibrate=path)
    assert aot_compile.read_given_rates(args, parse_topology("v5e:16x16")) == read
    with pytest.raises(ValueError, match="its rates are for another chip than v5p"):
        read_rates(path, CHIPS["v5p"])


def test_a_loop_is_as_long_as_its_passes():
    def wait(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return x

    def body(x):
        return jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert 0.01 <= timing.seconds_per_pass(body, jnp.float32(0), least=0.05) < 0.03


def test_collectives_over_eight_devices(monkeypatch: pytest.MonkeyPatch):
    ran = []

    def once(run, x, *, least):
        ran.append(np.asarray(jax.jit(run)(x)))
        return 1e-3

    monkeypatch.setattr(rates, "seconds_per_pass", once)
    outcome = rates.measure_collectives(CPU)
    assert [line.name.split(" ")[0] for line in outcome.lines] == [
        "all-gather", "reduce-scatter", "all-reduce", "all-to-all",
    ]  # fmt: skip
    assert all(line.measured == pytest.approx(2**20 / 1e-3 / 1e9) for line in outcome.lines)
    for result in ran:  # of ones: each body keeps them near 1, so that loops do not overflow
        assert np.isfinite(result).all() and 0.5 <= result.max() <= 1


def test_the_slice_is_found_by_coordinates():
    def devices(*places):
        return [SimpleNamespace(coords=place, slice_index=0) for place in places]

    square = topology_of(CHIPS["v5e"], devices((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)))
    assert square is not None and square.name == "v5e:2x2"
    assert topology_of(CHIPS["v5e"], devices((0, 0, 0), (1, 1, 0))) is None
    assert topology_of(CHIPS["v5e"], jax.devices()) is None


def test_an_unknown_chip_is_named(monkeypatch: pytest.MonkeyPatch):
    other = SimpleNamespace(platform="tpu", device_kind="TPU v99", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [other])
    device = find_device()
    assert (device.name, device.chip, device.peak_flops) == ("TPU v99", None, None)
    found = report.Report(device, {"memory": Outcome("measured", rates={"hbm_share": 0.5})})
    assert found.as_json()["device"] == "TPU v99" and found.as_json()["rates"] == {}


def test_sentences():
    assert Line("copy", "GB/s", 70, 100, "rates.hbm_share").sentence == (
        "copy is 30% lower than estimated; rates.hbm_share."
    )
    assert Line("step", "s", 1.5, 1.0).sentence == "step is 50% slower than estimated."
    assert Line("step", "s", 1.05, 1.0).sentence == Line("step", "s", 1.0).sentence == ""


def test_what_was_found_is_kept_when_the_time_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """A failure is not the end, a failed kernel check is an error, and no report is replaced in silence."""

    def fails(device, clock):
        raise RuntimeError("no memory")

    def slow(device, clock):
        time.sleep(0.1)
        return Outcome("measured", "figures", (Line("a rate", "GB/s", 2.0),))

    checks = (
        report.Check("host", "first", fails, 0), report.Check("memory", "second", slow, 0),
        report.Check("training", "third", slow, 0),
    )  # fmt: skip
    monkeypatch.setattr(report, "CHECKS", checks)
    path = tmp_path / "r.json"
    # Two seconds must be left on a CPU: after the second check they are not.
    assert check_hardware.main(["--out", str(path), "--minutes", str(2.08 / 60)]) == 0
    found = json.loads(path.read_text())
    statuses = {name: check["status"] for name, check in found["checks"].items()}
    assert statuses == {"host": "failed", "memory": "measured", "training": "skipped"}
    assert found["checks"]["host"]["text"] == "RuntimeError: no memory"
    assert check_hardware.main(["--out", str(path)]) == 1
    assert "give --overwrite to replace it" in capsys.readouterr().err
    monkeypatch.setattr(report, "CHECKS", (report.Check("kernels", "kernels", fails, 0),))
    assert check_hardware.main(["--out", str(path), "--overwrite"]) == check_hardware.EXIT_WRONG
    assert f"{path} is replaced." in capsys.readouterr().out
    assert json.loads(path.read_text())["wrong"]


def test_names_of_the_program_are_those_of_the_checks():
    assert tuple(check.name for check in report.CHECKS) == check_hardware.NAMES
