"""What a chip reaches in practice: the constants of the estimate (`bc2_jax.aot`) that a measurement can replace.

`default_rates` has them by documentation and static profiles, `read_rates` those that `tools/check_hardware.py`
measured. docs/tpu.md has the sources.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from bc2_jax.tpu.chips import CHIPS, Chip
from bc2_jax.validation import choices, require

HOST_BANDWIDTH = {"v6e": 32e9}
"""Bytes/s of a chip to or from host memory, one way. The PCIe of "How to Scale Your Model" gives 15 GB/s to the others
(https://github.com/jax-ml/scaling-book/blob/main/tpus.md)."""


@dataclasses.dataclass(frozen=True)
class KernelCycles:
    """Cycles of attention per block of queries x keys of one head on one TensorCore (libtpu's static profile)."""

    generation: str
    backward: bool
    block: int
    head_dim: int
    cycles: int

    @property
    def matmuls(self) -> int:
        """Block matmuls: scores and values forward; scores again and four gradients backward."""
        return 5 if self.backward else 2

    @property
    def efficiency(self) -> float:
        """Share of the TensorCore's peak."""
        flops = self.matmuls * 2 * self.block**2 * self.head_dim
        return flops / self.cycles / _flops_per_cycle(self.generation)


def _flops_per_cycle(generation: str) -> float:
    chip = CHIPS[generation]
    return chip.peak_flops / chip.tensor_cores / chip.clock


KERNEL_CYCLES = (
    KernelCycles("v5p", False, 1024, 128, 4_855),
    KernelCycles("v5p", True, 1024, 128, 10_894),
    KernelCycles("v6e", False, 1024, 128, 3_180),
    KernelCycles("v6e", True, 1024, 128, 5_927),
)
"""Other generations use the shares of the one with the same MXU. The share does not carry over between MXU sizes: a
head of 128 fills half of the wider MXU, and softmax takes as many cycles on both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What one chip reaches. Shares are of `Chip.peak_flops` and `Chip.hbm_bandwidth`, in 0..1."""

    matmul_share: float  # the fastest large bf16 matmul
    hbm_share: float  # streaming fusions and kernels
    attention_forward_share: float  # the attention kernel with heads of ATTENTION_HEAD_DIM
    attention_backward_share: float
    link_bandwidth: float  # bytes/s of one link, one way
    dcn_bandwidth: float  # bytes/s of the network between slices
    host_bandwidth: float  # bytes/s between HBM and host memory, one way
    measured: tuple[str, ...] = ()  # the fields above that a report gave

    def __post_init__(self) -> None:
        for name in FIELDS:
            _check(name, getattr(self, name))

    def as_json(self) -> dict[str, Any]:
        """The fields; `measured` lists those from a report."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Rates) if field.name != "measured")
"""The names that a report may give."""
ATTENTION_HEAD_DIM = 128


def default_rates(chip: Chip) -> Rates:
    """Without a measurement: by documentation, and attention by libtpu's static profile."""
    forward, backward = (
        next(k.efficiency for k in KERNEL_CYCLES if k.backward == is_backward and CHIPS[k.generation].mxu == chip.mxu)
        for is_backward in (False, True)
    )
    return Rates(
        matmul_share=1.0, hbm_share=0.85, attention_forward_share=forward, attention_backward_share=backward,
        link_bandwidth=chip.link_bandwidth, dcn_bandwidth=chip.dcn_bandwidth,
        host_bandwidth=HOST_BANDWIDTH.get(chip.name, 15e9),
    )  # fmt: skip


def read_rates(path: Path, chip: Chip) -> Rates:
    """The default with what a report of `tools/check_hardware.py` measured on this generation.

    The report is a JSON object with `device`, the generation, and `rates`, any of FIELDS in SI units per chip. Raises
    ValueError for another generation, a field that does not exist, and a value that is not a positive number (or, for a
    share, more than 1); OSError if it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid: it must be the JSON report of tools/check_hardware.py.") from error
    rates = report.get("rates") if isinstance(report, dict) else None
    if not isinstance(rates, dict):
        raise ValueError(f"{path} is not valid: it must be a JSON object with device and rates.")
    legal = f"its rates are for another chip than {chip.name}, for which this compiles"
    require(report.get("device") == chip.name, f"{path}: device", report.get("device"), legal)
    for name, value in rates.items():
        require(name in FIELDS, f"{path}: rates", name, f"legal names are {choices(FIELDS)}")
        _check(f"{path}: rates.{name}", value)
    values = {name: float(value) for name, value in rates.items()}
    return dataclasses.replace(default_rates(chip), **values, measured=tuple(values))


def _check(field: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if field.endswith("_share"):
        require(0 < number <= 1, field, value, "it must be more than 0 and at most 1")
    else:
        require(0 < number < math.inf, field, value, "it must be positive and finite")
