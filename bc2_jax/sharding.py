"""The mesh and the one table from logical axes to mesh axes; the only file that knows mesh axis names.

Everything runs on explicitly sharded meshes (`AxisType.Explicit`): a tensor's spec is part of its type, so a wrong
layout is an error at trace time and never a silent replication. Without a mesh the same code runs on one device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bc2_jax.config import MeshConfig
from bc2_jax.validation import require

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis (field) -> mesh axes (value)."""

    # Activations.
    batch: MeshAxes = ("data", "fsdp")
    lookup_batch: MeshAxes = "data"
    """The batch in the embedding lookup, where `embed` cuts the model dimension."""
    sequence: MeshAxes = None
    hidden: MeshAxes = None
    # Parameters and the activations that line up with them.
    vocab: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    ffn: MeshAxes = "tensor"
    layers: MeshAxes = None
    # The model dimension of a stored weight; it is gathered where the weight is used.
    embed: MeshAxes = "fsdp"

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of a tensor with these logical axes; None is an axis that is never cut.

        Raises ValueError for an unknown axis and for two dimensions on one mesh axis.
        """
        legal = [field.name for field in dataclasses.fields(self)]
        for axis in axes:
            if axis is not None and axis not in legal:
                raise ValueError(f"Logical axis {axis!r} is not known; legal names are {', '.join(legal)}.")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [m for e in entries if e is not None for m in ((e,) if isinstance(e, str) else e)]
        if len(used) != len(set(used)):
            raise ValueError(f"Axes {axes} put two dimensions of one tensor on the same mesh axis: {entries}.")
        return PartitionSpec(*entries)

    def sharding(self, *axes: str | None) -> NamedSharding | None:
        """The same on the mesh in use (`jax.set_mesh`), for `out_sharding=` arguments; None where there is no mesh.

        Raises ValueError on a mesh with axes that are not Explicit.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return None
        if not mesh.are_all_axes_explicit:
            raise ValueError(f"Mesh {mesh} has axes that are not Explicit; make it with bc2_jax.sharding.make_mesh.")
        return NamedSharding(mesh, self.spec(*axes))

    def reshard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x` laid out by its logical axes: a gather, a slice, an all-to-all or nothing."""
        sharding = self.sharding(*axes)
        return x if sharding is None else jax.reshard(x, sharding)


DEFAULT_RULES = ShardingRules()


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over `devices` (all by default).

    tensor varies fastest, so that its collectives stay between neighbours; data is outermost, and where there are
    several slices it alone goes across them. Raises ValueError if data is no multiple of the slices, or an axis does
    not lie along whole dimensions of the torus.
    """
    devices = jax.devices() if devices is None else devices
    config = config.resolve(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    require(config.data % slices == 0, "mesh.data", config.data, f"it must be a multiple of the {slices} slices")
    shape = (config.data // slices, config.fsdp, config.tensor)
    types = (AxisType.Explicit,) * len(MESH_AXES)
    try:
        if slices == 1:
            return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices)
    except NotImplementedError as error:
        torus = "x".join(str(1 + max(d.coords[i] for d in devices)) for i in range(len(devices[0].coords)))
        raise ValueError(
            f"mesh = {shape} (data, fsdp, tensor) does not fit a slice of {torus} chips: each axis must be a product "
            "of some of its sides."
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=types)


def single_device_mesh(device: Any | None = None) -> Mesh:
    """The 1 x 1 x 1 mesh."""
    return make_mesh(MeshConfig(fsdp=1), [device or jax.local_devices()[0]])


def use_cpu_devices(count: int) -> None:
    """Simulates `count` devices on the CPU; raises ValueError after the first JAX computation, when it is too late."""
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() != count:
            raise ValueError(
                f"mesh.num_cpu_devices = {count} is not possible: JAX already runs on {jax.device_count()} devices; "
                "set it before the first JAX computation."
            ) from error


@contextlib.contextmanager
def use_mesh_of(x: jax.Array) -> Iterator[None]:
    """Inside, the mesh of `x` is in use, unless one already is: callers of a sharded model need not say it twice."""
    mesh = jax.typeof(x).sharding.mesh  # type: ignore[attr-defined]  # jax declares the base class
    if mesh.empty or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    context: contextlib.AbstractContextManager = jax.sharding.use_abstract_mesh(mesh)
    if not isinstance(x, jax.core.Tracer):
        # Operations outside of jit need the devices too.
        with contextlib.suppress(ValueError):  # inside: the array is closed over
            context = jax.set_mesh(x.sharding.mesh)  # type: ignore[union-attr,attr-defined,arg-type]
    with context:
        yield
