"""The programs of `bc2_jax.infer.engine`, compiled ahead of time with abstract arrays.

`decode` is as long as the text, so one pass of it is estimated, with a full cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.aot.compilation import CompiledProgram, compile_program
from bc2_jax.config import ComputeConfig, MeshConfig, ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import CacheDType, make_chunk
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.cached import key_block
from bc2_jax.model.baichuan import abstract_params, split_model
from bc2_jax.model.quantized import Scheme, item_bytes
from bc2_jax.sharding import place_shapes, use_rules
from bc2_jax.tpu.chips import Topology
from bc2_jax.tpu.options import Value


@dataclasses.dataclass(frozen=True)
class CompiledEngine:
    """The engine's programs."""

    allocate: CompiledProgram
    extend: CompiledProgram
    decode: CompiledProgram
    chunk_length: int
    key_block: int  # keys that a chunk attends to in one pass of a loop
    cache_bytes: int  # keys, values and their scales, per device
    state_bytes: int  # all state of the rows with the cache, per device


def whole_slice_mesh(topology: Topology) -> MeshConfig:
    """Tensor parallelism over all devices of a slice; slices are replicas."""
    return MeshConfig(data=topology.num_slices, fsdp=1, tensor=topology.num_devices // topology.num_slices)


def inference_compute(compute: ComputeConfig) -> ComputeConfig:
    """`compute` without remat and compiler options of its own."""
    return dataclasses.replace(compute, remat="none", compiler_options="default")


def abstract_prepared(
    model: ModelConfig, compute: ComputeConfig, mesh: Mesh, kv: CacheDType, quantize: Scheme | None = None
) -> engine.Prepared:
    """The result of `engine.prepare` for a model on `mesh`, as shapes with shardings."""
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        graphdef = split_model(model, compute)[0]
        stored = abstract_params(model, mesh, compute.dtype)
        prepare = functools.partial(engine.prepare, kv=kv, quantize=quantize)
        return place_shapes(mesh, jax.eval_shape(lambda params: prepare(nnx.merge(graphdef, params)), stored))


class AbstractEngine:
    """The engine's programs for one batch shape; each is compiled when asked for.

    Compiling raises DoesNotFit if the chip's memory is too small.
    """

    def __init__(
        self, prepared: engine.Prepared, mesh: Mesh, shapes: RolloutShapes, sampling_of_rows: Callable[[int], Sampling],
        options: dict[str, Value],
    ):  # fmt: skip
        """`prepared` is abstract. `sampling_of_rows(rows)` gives the settings; those that are None are not compiled, as
        in `engine.allocate`."""
        self._prepared, self._mesh, self._shapes, self._options = prepared, mesh, shapes, options
        self._sampling_of_rows = sampling_of_rows
        self._programs = engine.programs(prepared.compute)
        with self._in_use():
            self.chunk_length, self.key_block = engine.chunk_length(), key_block(shapes.slots)
            self._sampling = self._abstract(sampling_of_rows(shapes.rows))
            empty = functools.partial(self._programs.allocate, slots=shapes.slots)
            self.state = place_shapes(mesh, jax.eval_shape(empty, prepared, self._sampling))

    def decode(self) -> CompiledProgram:
        given = self._abstract((np.int32(1), np.zeros(self._shapes.rows, bool)))
        return self._compile("decoding loop", "decode", self._prepared, self.state, *given)

    def compile(self, decode: CompiledProgram | None = None) -> CompiledEngine:
        """All programs; `decode` if it is compiled already."""
        allocate = self._compile(
            "allocation", "allocate", self._prepared, self._sampling, slots=self._shapes.slots
        )  # fmt: skip
        rows = self._shapes.prefill_rows
        chunk = make_chunk([None] * rows, 0, self.chunk_length, self._shapes.slots)
        given = self._abstract((chunk, self._sampling_of_rows(rows)))
        extend = self._compile("chunk of prompts", "extend", self._prepared, self.state, *given)
        return CompiledEngine(
            allocate, extend, decode or self.decode(), self.chunk_length, self.key_block,
            device_bytes(self.state.cache), device_bytes(self.state),
        )  # fmt: skip

    def _compile(self, name: str, program: str, *arguments: Any, **static: Any) -> CompiledProgram:
        with self._in_use():
            lower = functools.partial(getattr(self._programs, program).lower, *arguments, **static)
            return compile_program(name, lower, self._options)

    def _abstract(self, tree: Any) -> Any:
        return place_shapes(self._mesh, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree)))

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), use_rules(engine.decoding_rules()):
            yield


def device_bytes(tree: Any) -> int:
    """Bytes on one device of arrays or their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(int(math.prod(x.sharding.shard_shape(x.shape)) * item_bytes(x.dtype)) for x in leaves)
