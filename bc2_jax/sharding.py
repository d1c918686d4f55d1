"""The mesh and the one table from logical axes to mesh axes; the only file that knows mesh axis names.

Everything runs on explicitly sharded meshes (`AxisType.Explicit`): a tensor's spec is part of its type, so a wrong
layout is an error at trace time and never a silent replication. Without a mesh the same code runs on one device.
Both the mesh (`jax.set_mesh`) and the table (`use_rules`) come from the context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bc2_jax.config import MeshConfig
from bc2_jax.validation import require

MESH_AXES = ("data", "fsdp", "fsdp_inner", "context", "tensor")
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis (field) -> mesh axes (value)."""

    # Activations.
    batch: MeshAxes = ("data", "fsdp", "fsdp_inner")
    lookup_batch: MeshAxes = "data"
    """The batch in the embedding lookup, where `embed` cuts the model dimension."""
    lookup_embed: MeshAxes = ("fsdp", "fsdp_inner")
    """The model dimension of what was looked up, once the sequences are cut: `embed` without the axes of `sequence`."""
    sequence: MeshAxes = "context"
    hidden: MeshAxes = None
    attention_heads: MeshAxes = ("tensor", "context")
    """Heads inside attention, where each device has whole sequences (DeepSpeed-Ulysses, arXiv 2309.14509): neither the
    kernel nor ALiBi needs to know that sequences are cut elsewhere."""
    sampling: MeshAxes = ("data", "fsdp", "fsdp_inner", "tensor", "context")
    """The rows of a batch where a token of each is drawn: `batch`, and cut further over the devices that share a row,
    each of which then has the whole vocabulary of its own rows."""
    # Parameters and the activations that line up with them.
    vocab: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    ffn: MeshAxes = "tensor"
    layers: MeshAxes = None
    # The model dimension of a stored weight; it is gathered where the weight is used.
    embed: MeshAxes = ("fsdp", "fsdp_inner", "context")

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of a tensor with these logical axes; None is an axis that is never cut.

        Raises ValueError for an unknown axis and for two dimensions on one mesh axis.
        """
        legal = [field.name for field in dataclasses.fields(self)]
        for axis in axes:
            if axis is not None and axis not in legal:
                raise ValueError(f"Logical axis {axis!r} is not known; legal names are {', '.join(legal)}.")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = self.mesh_axes(*(axis for axis in axes if axis is not None))
        if len(used) != len(set(used)):
            raise ValueError(f"Axes {axes} put two dimensions of one tensor on the same mesh axis: {entries}.")
        return PartitionSpec(*entries)

    def mesh_axes(self, *axes: str) -> tuple[str, ...]:
        """The mesh axes along which these logical axes are cut, outermost first."""
        entries = [getattr(self, axis) for axis in axes]
        return tuple(m for e in entries if e is not None for m in ((e,) if isinstance(e, str) else e))


DEFAULT_RULES = ShardingRules()
# A context of JAX's own: what is traced under other rules is traced again, as it is under another mesh.
use_rules = jax.make_user_context(DEFAULT_RULES)


def rules_in_use() -> ShardingRules:
    """The rules of the innermost `with use_rules(rules):`, by default DEFAULT_RULES."""
    return use_rules.value


def spec(*axes: str | None) -> PartitionSpec:
    """`ShardingRules.spec` of the rules in use."""
    return rules_in_use().spec(*axes)


def mesh_axes(*axes: str) -> tuple[str, ...]:
    """`ShardingRules.mesh_axes` of the rules in use."""
    return rules_in_use().mesh_axes(*axes)


def named_sharding(*axes: str | None) -> NamedSharding | None:
    """`spec` on the mesh in use (`jax.set_mesh`), for `out_sharding=` arguments; None where there is no mesh.

    Raises ValueError on a mesh with other axes than MESH_AXES or with axes that are not Explicit.
    """
    mesh = _mesh_in_use()
    return None if mesh is None else NamedSharding(mesh, spec(*axes))


def parts(axis: str) -> int:
    """Into how many parts the mesh in use cuts a logical axis."""
    mesh = _mesh_in_use()
    return 1 if mesh is None else math.prod(mesh.shape[m] for m in mesh_axes(axis))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes: a gather, a slice, an all-to-all or nothing."""
    sharding = named_sharding(*axes)
    return x if sharding is None else jax.reshard(x, sharding)


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """A stored weight `x` with these logical axes, its `embed` dimension whole if it has one and is not yet.

    One gather for each mesh axis in use, the innermost first, when there is least to send: each then lies along whole
    dimensions of the torus, and stays a gather where the compiler makes an all-reduce of a single large one.
    """
    sharding = named_sharding(*axes)
    if sharding is None or "embed" not in axes:
        return x
    dim, cut = axes.index("embed"), mesh_axes("embed")
    is_whole = jax.typeof(x).sharding.spec[dim] is None  # type: ignore[attr-defined]  # jax declares the base class
    for count in reversed(range(len(cut))):
        if count == 0 or (sharding.mesh.shape[cut[count]] > 1 and not is_whole):
            stage = (*sharding.spec[:dim], cut[:count] or None, *sharding.spec[dim + 1 :])
            x = jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*stage)))
    return x


def all_gather(x: jax.Array, dim: int) -> jax.Array:
    """Inside `shard_map`: `x`, whose dimension `dim` is cut as `embed` is, with this dimension whole, in stages."""
    for axis in reversed(mesh_axes("embed")):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


def reduce_scatter(x: jax.Array, *axes: str | None) -> jax.Array:
    """Inside `shard_map`: the sum over all rows and tokens of `x`, which has these logical axes and `embed` whole.

    The sum is cut along `embed` if it has this axis: one scatter for each mesh axis, the outermost first, then what is
    left of the batch: the inverse of `gather`.
    """
    scattered = mesh_axes("embed") if "embed" in axes else ()
    for axis in scattered:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=axes.index("embed"), tiled=True)
    rest = tuple(axis for axis in mesh_axes("batch", "sequence") if axis not in scattered)
    return jax.lax.psum(x, rest) if rest else x


def _mesh_in_use() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if not mesh.are_all_axes_explicit:
        raise ValueError(f"Mesh {mesh} has axes that are not Explicit; make it with {__name__}.make_mesh.")
    if mesh.axis_names != MESH_AXES:
        raise ValueError(f"Mesh {mesh} has not the axes {', '.join(MESH_AXES)}; make it with {__name__}.make_mesh.")
    return mesh


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes MESH_AXES over `devices` (all by default).

    tensor varies fastest, so that its collectives stay between neighbours; data is outermost, and where there are
    several slices it alone goes across them. Raises ValueError if data is not a multiple of the slices, or an axis does
    not lie along whole dimensions of the torus.
    """
    devices = jax.devices() if devices is None else devices
    config = config.resolve(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    require(config.data % slices == 0, "mesh.data", config.data, f"it must be a multiple of the {slices} slices")
    if config.fsdp_inner == -1:
        inner = _second_stage(config, devices)
        config = dataclasses.replace(config, fsdp=config.fsdp // inner, fsdp_inner=inner)
    shape = (config.data // slices, *(getattr(config, axis) for axis in MESH_AXES[1:]))
    types = (AxisType.Explicit,) * len(MESH_AXES)
    try:
        if slices == 1:
            return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, *[1] * len(shape[1:])), devices)
    except NotImplementedError as error:  # what JAX raises for axes that the torus of the chips does not have
        torus = "x".join(str(1 + max(d.coords[i] for d in devices)) for i in range(len(devices[0].coords)))
        raise ValueError(
            f"mesh = {shape} ({', '.join(MESH_AXES)}) does not fit a slice of {torus} chips: each axis must be a "
            "product of some of its sides."
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=types)


def _second_stage(config: MeshConfig, devices: list[Any]) -> int:
    """Devices of the second stage of gathers and scatters, 1 for none.

    One axis of parameter shards over all of a 3-D torus has its gathers compiled to all-reduces (docs/tpu.md): then the
    longest side goes apart.
    """
    if not hasattr(devices[0], "coords"):
        return 1
    sides = [len({device.coords[i] for device in devices}) for i in range(len(devices[0].coords))]
    spans_torus = len(sides) == 3 and min(sides) > 1 and config.fsdp == math.prod(sides)
    return max(sides) if spans_torus else 1


def single_device_mesh(device: Any | None = None) -> Mesh:
    """The mesh of one device."""
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


def platform() -> str:
    """Of the devices of the mesh in use, which may not be here, or of JAX's own: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def place_shapes(mesh: Mesh, tree: Any) -> Any:
    """A tree of ShapeDtypeStructs as `jax.eval_shape` gives them, with shardings on `mesh`.

    Under an explicit mesh eval_shape tells the spec of what is computed from arrays with one, such as the moments of a
    parameter; what has none, such as a counter, is whole everywhere.
    """

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = spec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, own))

    return jax.tree.map(place, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of `x`, however it is laid out; where it spans processes, all of them call this and all get it."""
    within = x.is_fully_addressable or x.is_fully_replicated
    # Explicitly: what a run does between its steps is under a transfer guard.
    return np.asarray(jax.device_get(x) if within else multihost_utils.process_allgather(x, tiled=True))


def from_host(tree: Any) -> Any:
    """`tree` with its arrays of numpy whole on every device of the mesh in use, or on the default device without one.

    Each process gives the same values. Other leaves, and all of them where a function is traced, stay as they are.
    """
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside of jit
        return tree

    def put(x: Any) -> Any:
        if not isinstance(x, np.ndarray | np.generic):
            return x
        if mesh.empty:
            return jax.device_put(x)
        sharding = NamedSharding(mesh, PartitionSpec())
        shards = [jax.device_put(x, device) for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(np.shape(x), sharding, shards)

    return jax.tree.map(put, tree)


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
            context = jax.set_mesh(x.sharding.mesh)  # type: ignore[union-attr,attr-defined,arg-type]  # as above
    with context:
        yield
