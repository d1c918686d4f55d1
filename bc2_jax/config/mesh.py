"""Devices along each mesh axis, and what they must divide."""

from __future__ import annotations

import dataclasses
import math

from bc2_jax.config.model import ModelConfig
from bc2_jax.validation import choices, divisors, require, require_at_most, require_types

# Each simulated device is a thread pool of its own, all made before the first error can be found.
_MOST_CPU_DEVICES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; the product is the number of devices."""

    data: int = 1
    """Replicas of the parameters (across slices)."""
    fsdp: int = -1
    """Devices that share parameters, gradients and optimizer state; -1 takes all that remain."""
    fsdp_inner: int = -1
    """Cuts the share of each of these devices again, so that weights are gathered and gradients scattered in two
    stages, each along its own dimensions of the torus. -1 splits fsdp so where that is known to be faster."""
    context: int = 1
    """Devices that share the tokens of a sequence, and parameters as fsdp does; for long sequences."""
    tensor: int = 1
    """Devices that share heads, feed-forward columns and vocabulary."""
    num_cpu_devices: int = 0
    """Simulate this many devices on the CPU, in each process; 0 uses the available accelerators."""

    def __post_init__(self) -> None:
        require_types(self, "mesh.")
        require_at_most(self, "mesh.", num_cpu_devices=_MOST_CPU_DEVICES)
        for field in ("data", "context", "tensor"):
            require(getattr(self, field) >= 1, f"mesh.{field}", getattr(self, field), "it must be at least 1")
        for field, rest in (("fsdp", "-1 for the rest"), ("fsdp_inner", "-1 to leave it open")):
            value = getattr(self, field)
            require(value >= 1 or value == -1, f"mesh.{field}", value, f"it must be at least 1, or {rest}")
        require(self.num_cpu_devices >= 0, "mesh.num_cpu_devices", self.num_cpu_devices, "it must be at least 0")

    def resolve(self, num_devices: int) -> MeshConfig:
        """Fills in fsdp = -1 and checks the product against the number of devices."""
        return dataclasses.replace(self, fsdp=self._fsdp_devices(num_devices))

    @property
    def batch_shards(self) -> tuple[str, int]:
        """The parts into which the rows of a batch are cut, as `product`."""
        return self.product("data", "fsdp", "fsdp_inner")

    @property
    def parameter_shards(self) -> tuple[str, int]:
        """The parts into which the model dimension of each weight is cut, as `product`."""
        return self.product("fsdp", "fsdp_inner", "context")

    def product(self, *axes: str) -> tuple[str, int]:
        """What to call the product of these axes in a message, by those that are not 1, and its value.

        It is negative while fsdp = -1 is not resolved.
        """
        sizes = {axis: getattr(self, axis) for axis in axes}
        if sizes.get("fsdp_inner") == -1:
            sizes["fsdp_inner"] = 1  # a part of fsdp
        named = [axis for axis, size in sizes.items() if size != 1] or axes[:1]
        return " * ".join(f"mesh.{axis}" for axis in named), math.prod(sizes.values())

    def _fsdp_devices(self, num_devices: int) -> int:
        name, others = self.product("data", "fsdp_inner", "context", "tensor")
        legal = choices(divisors(num_devices))
        require(
            num_devices % others == 0,
            name,
            others,
            f"it must divide the {num_devices} devices; legal values are {legal}",
        )
        fsdp = num_devices // others
        require(
            self.fsdp in (-1, fsdp), "mesh.fsdp", self.fsdp,
            f"with {name} = {others}, {num_devices} devices leave fsdp = {fsdp}",
        )  # fmt: skip
        return fsdp


def check_divisible(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError, naming the field and the legal values, if the parameters cannot be cut along the mesh."""
    heads = {"num_attention_heads": model.num_attention_heads}
    columns = {"intermediate_size": model.intermediate_size, "vocab_size": model.vocab_size}
    cuts: list[tuple[tuple[str, ...], dict[str, int]]] = [
        (("tensor",), heads | columns),
        # In attention each device has some of the heads of whole sequences.
        (("context", "tensor"), heads),
        (("fsdp", "fsdp_inner", "context"), {"hidden_size": model.hidden_size}),
    ]
    for axes, dims in cuts:
        field, size = mesh.product(*axes)
        legal = choices(divisors(math.gcd(*dims.values())))
        for name, dim in dims.items():
            require(
                size < 0 or dim % size == 0,
                field,
                size,
                f"it must divide model.{name} = {dim}; legal values are {legal}",
            )
