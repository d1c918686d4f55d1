"""The device mesh, and the dimensions that it must divide."""

from __future__ import annotations

import dataclasses
import math

from bc2_jax.config.model import ModelConfig
from bc2_jax.validation import check_fields, choices, divisors, require, require_at_most

# Each simulated device has its own thread pool, made before any error is found.
_MOST_CPU_DEVICES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; the product is the number of devices."""

    data: int = 1
    """Replicas of the parameters, across slices."""
    fsdp: int = -1
    """Shards of parameters, gradients and optimizer state; -1: all remaining devices."""
    fsdp_inner: int = -1
    """Second level of fsdp: weights are gathered and gradients scattered in two stages, each along its own dimensions
    of the torus. -1 splits fsdp where that is known to be faster."""
    context: int = 1
    """Shards of the tokens of a sequence, and of parameters as fsdp; for long sequences."""
    tensor: int = 1
    """Shards of heads, feed-forward columns and vocabulary."""
    num_cpu_devices: int = 0
    """Simulated CPU devices in each process; 0 uses the available accelerators."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh.", not_negative=("num_cpu_devices",))
        require_at_most(self, "mesh.", num_cpu_devices=_MOST_CPU_DEVICES)
        for field in ("data", "context", "tensor"):
            require(getattr(self, field) >= 1, f"mesh.{field}", getattr(self, field), "it must be at least 1")
        for field, rest in (("fsdp", "-1 for the rest"), ("fsdp_inner", "-1 to leave it open")):
            value = getattr(self, field)
            require(value >= 1 or value == -1, f"mesh.{field}", value, f"it must be at least 1, or {rest}")

    def resolve(self, num_devices: int) -> MeshConfig:
        """Fills in fsdp = -1. Raises ValueError unless the product is the number of devices."""
        return dataclasses.replace(self, fsdp=self._fsdp_devices(num_devices))

    @property
    def batch_shards(self) -> tuple[str, int]:
        """Number of shards of the rows of a batch, as `product`."""
        return self.product("data", "fsdp", "fsdp_inner")

    @property
    def parameter_shards(self) -> tuple[str, int]:
        """Number of shards of the hidden dimension of each weight, as `product`."""
        return self.product("fsdp", "fsdp_inner", "context")

    def product(self, *axes: str) -> tuple[str, int]:
        """(name in messages, product of these axes), negative while fsdp = -1 is not resolved."""
        sizes = {axis: getattr(self, axis) for axis in axes}
        if sizes.get("fsdp_inner") == -1:
            sizes["fsdp_inner"] = 1  # a part of fsdp
        named = [axis for axis, size in sizes.items() if size != 1] or axes[:1]
        return " * ".join(f"mesh.{axis}" for axis in named), math.prod(sizes.values())

    def _fsdp_devices(self, num_devices: int) -> int:
        name, others = self.product("data", "fsdp_inner", "context", "tensor")
        legal = f"it must divide the {num_devices} devices; legal values are {choices(divisors(num_devices))}"
        require(num_devices % others == 0, name, others, legal)
        fsdp = num_devices // others
        require(
            self.fsdp in (-1, fsdp), "mesh.fsdp", self.fsdp,
            f"with {name} = {others}, {num_devices} devices leave fsdp = {fsdp}",
        )  # fmt: skip
        return fsdp


def check_divisible(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError, with field and legal values, if the parameters can't be sharded over the mesh."""
    heads = {"num_attention_heads": model.num_attention_heads}
    columns = {"intermediate_size": model.intermediate_size, "vocab_size": model.vocab_size}
    cuts: list[tuple[tuple[str, ...], dict[str, int]]] = [
        (("tensor",), heads | columns),
        # In attention each device has some heads of whole sequences.
        (("context", "tensor"), heads),
        (("fsdp", "fsdp_inner", "context"), {"hidden_size": model.hidden_size}),
    ]
    for axes, dims in cuts:
        field, size = mesh.product(*axes)
        legal = choices(divisors(math.gcd(*dims.values())))
        for name, dim in dims.items():
            message = f"it must divide model.{name} = {dim}; legal values are {legal}"
            require(size < 0 or dim % size == 0, field, size, message)
