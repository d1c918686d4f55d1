"""The device mesh and the table from logical axes to mesh axes; the only module that names mesh axes.

All meshes are explicit (`AxisType.Explicit`): a tensor's spec is part of its type, so a wrong layout is an error at
trace time and never a silent replication. Without a mesh the same code runs on one device. The mesh (`jax.set_mesh`)
and the table (`use_rules`) are taken from the context.
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
from bc2_jax.tpu.chips import CHIPS, DEVICE_KINDS
from bc2_jax.validation import require

MESH_AXES = ("data", "fsdp", "fsdp_inner", "context", "tensor")
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis (field) -> mesh axes (value)."""

    # Activations.
    batch: MeshAxes = ("data", "fsdp", "fsdp_inner")
    lookup_batch: MeshAxes = "data"
    """The batch in the embedding lookup, where `embed` shards the model dimension."""
    lookup_embed: MeshAxes = ("fsdp", "fsdp_inner")
    """The model dimension after the lookup, once the sequences are sharded: `embed` without the axes of `sequence`."""
    sequence: MeshAxes = "context"
    hidden: MeshAxes = None
    attention_heads: MeshAxes = ("tensor", "context")
    """Heads inside attention, where each device has whole sequences (DeepSpeed-Ulysses, arXiv 2309.14509), so that
    kernels and ALiBi need not know about sharded sequences."""
    sampling: MeshAxes = ("data", "fsdp", "fsdp_inner", "tensor", "context")
    """Rows of the batch while sampling: also sharded over the devices that share a row, each of which then has the
    whole vocabulary for its rows."""
    # Parameters and the activations that line up with them.
    vocab: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    ffn: MeshAxes = "tensor"
    layers: MeshAxes = None
    # The model dimension of a stored weight, which is gathered when the weight is used.
    embed: MeshAxes = ("fsdp", "fsdp_inner", "context")

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of a tensor with these logical axes; None is an axis that is never sharded.

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
        """The mesh axes over which these logical axes are sharded, outermost first."""
        entries = [getattr(self, axis) for axis in axes]
        return tuple(m for e in entries if e is not None for m in ((e,) if isinstance(e, str) else e))


DEFAULT_RULES = ShardingRules()
# A JAX context: functions are traced again under other rules, as under another mesh.
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
    """`spec` on the mesh in use (`jax.set_mesh`), for `out_sharding=`; None without a mesh.

    Raises ValueError for a mesh with axes other than MESH_AXES or that are not Explicit.
    """
    mesh = _mesh_in_use()
    return None if mesh is None else NamedSharding(mesh, spec(*axes))


def parts(axis: str) -> int:
    """The number of shards of a logical axis on the mesh in use."""
    mesh = _mesh_in_use()
    return 1 if mesh is None else math.prod(mesh.shape[m] for m in mesh_axes(axis))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes: a gather, a slice, an all-to-all or nothing."""
    sharding = named_sharding(*axes)
    return x if sharding is None else jax.reshard(x, sharding)


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """A stored weight `x` with these logical axes, gathered along `embed`.

    On a 2-D torus one gather along both of its dimensions. Elsewhere one for each mesh axis, innermost first, when the
    least data is sent: the compiler turns one along three dimensions into an all-reduce.
    """
    sharding = named_sharding(*axes)
    if sharding is None or "embed" not in axes:
        return x
    dim, cut = axes.index("embed"), mesh_axes("embed")
    is_whole = jax.typeof(x).sharding.spec[dim] is None  # type: ignore[attr-defined]  # jax declares the base class
    for count in [0] if _is_on_plane() else reversed(range(len(cut))):
        if count == 0 or (sharding.mesh.shape[cut[count]] > 1 and not is_whole):
            stage = (*sharding.spec[:dim], cut[:count] or None, *sharding.spec[dim + 1 :])
            x = jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*stage)))
    return x


def all_gather(x: jax.Array, dim: int) -> jax.Array:
    """Inside `shard_map`: `x` gathered along dimension `dim`, which is sharded as `embed`, as `gather` does it."""
    cut = mesh_axes("embed")
    for axes in [cut] if _is_on_plane() else reversed(cut):
        x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _is_on_plane() -> bool:
    """Whether the devices are TPU chips whose torus has two dimensions."""
    chip = current_chip()
    return chip is not None and CHIPS[chip].torus_dims == 2


def reduce_scatter(x: jax.Array, *axes: str | None) -> jax.Array:
    """Inside `shard_map`: the sum of `x` over all rows and tokens; `x` has these logical axes, `embed` unsharded.

    The inverse of `gather`: one scatter along `embed` for each mesh axis, outermost first, then the rest of the batch.
    """
    scattered = mesh_axes("embed") if "embed" in axes else ()
    for axis in scattered:
        if jax.lax.axis_size(axis) > 1:  # XLA:CPU would copy `x`
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=axes.index("embed"), tiled=True)
    rest = tuple(axis for axis in mesh_axes("batch", "sequence") if axis not in scattered)
    return jax.lax.psum(x, rest) if rest else x


def first_stage() -> int:
    """The number of devices in the first stage of a scatter along `embed`; 1 without one."""
    mesh = _mesh_in_use()
    sizes = [] if mesh is None else [mesh.shape[axis] for axis in mesh_axes("embed")]
    return next((size for size in sizes if size > 1), 1)


def _mesh_in_use() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if not mesh.are_all_axes_explicit:
        raise ValueError(f"Mesh {mesh} has axes that are not Explicit; make it with {__name__}.make_mesh.")
    if mesh.axis_names != MESH_AXES:
        raise ValueError(f"Mesh {mesh} lacks the axes {', '.join(MESH_AXES)}; make it with {__name__}.make_mesh.")
    return mesh


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes MESH_AXES over `devices` (default: all).

    `tensor` varies fastest, so that its collectives stay between neighbours. `data` is outermost; with several slices
    it alone crosses them. Raises ValueError if `data` is not a multiple of the slices, or if an axis does not lie along
    whole dimensions of the torus.
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
    except NotImplementedError as error:  # JAX raises it for axes that the torus of the chips lacks
        torus = "x".join(str(1 + max(d.coords[i] for d in devices)) for i in range(len(devices[0].coords)))
        raise ValueError(
            f"mesh = {shape} ({', '.join(MESH_AXES)}) does not fit a slice of {torus} chips: each axis must be a "
            "product of some of its sides."
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=types)


def _second_stage(config: MeshConfig, devices: list[Any]) -> int:
    """Devices of the second stage of gathers and scatters (`fsdp_inner`); 1 for none.

    The compiler turns the gathers of a single axis over a whole 3-D torus into all-reduces (docs/tpu.md), so its
    longest side becomes a stage of its own.
    """
    if not hasattr(devices[0], "coords"):
        return 1
    sides = [len({device.coords[i] for device in devices}) for i in range(len(devices[0].coords))]
    spans_torus = len(sides) == 3 and min(sides) > 1 and config.fsdp == math.prod(sides)
    return max(sides) if spans_torus else 1


def use_cpu_devices(count: int) -> None:
    """Simulates `count` CPU devices; raises ValueError after the first JAX computation, when it is too late."""
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
    """The platform of the mesh in use, which may be abstract, else of JAX's default backend: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def current_chip() -> str | None:
    """The chip of the mesh in use, else of the default device; None if it is unknown.

    The mesh comes first: ahead-of-time compilation for a TPU runs on a machine without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return DEVICE_KINDS.get(device.device_kind)


def place_shapes(mesh: Mesh, tree: Any) -> Any:
    """Adds shardings on `mesh` to a tree of ShapeDtypeStructs from `jax.eval_shape`.

    Under an explicit mesh, eval_shape gives the spec of values computed from sharded arrays, such as Adam's moments;
    values without a spec, such as a counter, are replicated.
    """

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = spec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, own))

    return jax.tree.map(place, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """All of `x` as a numpy array; if it spans processes, all of them call this and all get it."""
    within = x.is_fully_addressable or x.is_fully_replicated
    # Explicitly, because training steps run under a transfer guard.
    return np.asarray(jax.device_get(x) if within else multihost_utils.process_allgather(x, tiled=True))


def from_host(tree: Any) -> Any:
    """`tree` with its numpy arrays replicated on the mesh in use, or on the default device without one.

    Every process passes the same values. Other leaves, and all leaves while tracing, are returned unchanged.
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
    """Context manager that uses the mesh of `x` unless a mesh is already in use, so that callers of a sharded model
    need not set it."""
    mesh = jax.typeof(x).sharding.mesh  # type: ignore[attr-defined]  # jax declares the base class
    if mesh.empty or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    context: contextlib.AbstractContextManager = jax.sharding.use_abstract_mesh(mesh)
    if not isinstance(x, jax.core.Tracer):
        # Operations outside of jit need the devices too.
        with contextlib.suppress(ValueError):  # inside jit the array is a closed-over constant
            context = jax.set_mesh(x.sharding.mesh)  # type: ignore[union-attr,attr-defined,arg-type]  # as above
    with context:
        yield
