"""The constants of the estimate and the reports that replace them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bc2_jax.tpu.chips import CHIPS
from bc2_jax.tpu.rates import FIELDS, KERNEL_CYCLES, default_rates, read_rates

V5E = CHIPS["v5e"]


def report(folder: Path, rates: object, device: object = "v5e") -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps({"device": device, "rates": rates, "table": []}))
    return path


def test_kernel_efficiency():
    """The floor of a 1024 x 1024 block at head size 128 is 4,096 cycles forward and 10,240 backward on v5p, where an
    MXU is 128 wide; a v6e core could do four times as much, but a head of 128 fills half of its MXUs."""
    shares = [kernel.efficiency for kernel in KERNEL_CYCLES]
    assert shares == pytest.approx([4096 / 4855, 10240 / 10894, 1024 / 3180, 2560 / 5927], rel=1e-3)


@pytest.mark.parametrize("name", list(CHIPS))
def test_every_generation_has_rates(name: str):
    chip, rates = CHIPS[name], default_rates(CHIPS[name])
    same_mxu = {128: "v5p", 256: "v6e"}[chip.mxu]
    shares = [k.efficiency for k in KERNEL_CYCLES if k.generation == same_mxu]
    assert [rates.attention_forward_share, rates.attention_backward_share] == shares
    assert (rates.link_bandwidth, rates.dcn_bandwidth) == (chip.link_bandwidth, chip.dcn_bandwidth)
    assert rates.host_bandwidth < rates.link_bandwidth and rates.measured == ()


def test_a_report_replaces_what_it_has(tmp_path):
    default = default_rates(V5E)
    given = {"matmul_share": 0.93, "link_bandwidth": 40_000_000_000}
    rates = read_rates(report(tmp_path, given), V5E)
    assert rates == dataclasses.replace(default, **given, measured=("matmul_share", "link_bandwidth"))
    assert rates.as_json()["measured"] == ("matmul_share", "link_bandwidth")
    assert read_rates(report(tmp_path, {}), V5E) == default
    everything = {name: getattr(default, name) for name in FIELDS}
    assert read_rates(report(tmp_path, everything), V5E).measured == FIELDS


@pytest.mark.parametrize(
    ("rates", "device", "message"),
    [
        ({}, "v6e", "device = 'v6e' is not valid: its rates are for another chip than v5e"),
        ({}, None, "device = None is not valid"),
        ({"matmul": 0.9}, "v5e", "rates = 'matmul' is not valid: legal names are matmul_share, hbm_share"),
        ({"measured": 1}, "v5e", "rates = 'measured' is not valid"),
        ({"matmul_share": 1.2}, "v5e", "rates.matmul_share = 1.2 is not valid: it must be more than 0 and at most 1"),
        ({"matmul_share": 0}, "v5e", "rates.matmul_share = 0 is not valid"),
        ({"link_bandwidth": -1.0}, "v5e", "rates.link_bandwidth = -1.0 is not valid: it must be positive and finite"),
        ({"host_bandwidth": float("inf")}, "v5e", "rates.host_bandwidth = inf is not valid"),
        ({"host_bandwidth": float("nan")}, "v5e", "rates.host_bandwidth = nan is not valid"),
        ({"hbm_share": True}, "v5e", "rates.hbm_share = True is not valid"),
        ({"hbm_share": "0.8"}, "v5e", "rates.hbm_share = '0.8' is not valid"),
        ([0.9], "v5e", "it must be a JSON object with device and rates"),
    ],
)
def test_refused_reports(tmp_path, rates, device, message):
    with pytest.raises(ValueError) as error:
        read_rates(report(tmp_path, rates, device), V5E)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_a_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("# not JSON")
    with pytest.raises(ValueError, match="it must be the JSON report of tools/check_hardware.py"):
        read_rates(path, V5E)
    with pytest.raises(FileNotFoundError):
        read_rates(tmp_path / "missing.json", V5E)
