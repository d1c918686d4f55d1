"""Quantized models on disk: a checkpoint of the parameters in their decoding layout, with a manifest.

Two int4 values share a byte, the first in its lower half; a group with an odd number of values is padded with a zero.
The metadata has the architecture and the quantization scheme.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert import hf, orbax
from bc2_jax.convert.checkpoints import model_metadata, open_metadata, open_params, quantized_scheme
from bc2_jax.convert.folder import foreign_in_checkpoint, written_whole
from bc2_jax.convert.table import Shape
from bc2_jax.manifest import MANIFEST_NAME, DamagedCheckpoint, write_manifest
from bc2_jax.metadata import is_complete
from bc2_jax.model.baichuan import Baichuan2, abstract_params, split_model
from bc2_jax.model.layers import Linear
from bc2_jax.model.layout import lay_out, scheme_of
from bc2_jax.model.quantized import PARTS, Scheme
from bc2_jax.sharding import place_shapes
from bc2_jax.validation import check_path

INT4 = jnp.dtype("int4")


def save(
    model: Baichuan2, target: str | Path, *, tokenizer: Path | None = None, generation: Mapping[str, Any] | None = None,
    chat_template: str | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes a quantized model, whose arrays are all in this process, to a folder that `find_model` finds, layer by
    layer.

    Copies `tokenizer` and stores `generation` and `chat_template` in the metadata. Raises ValueError for a model that
    is not quantized, or whose int4 weights the mesh left in int8; FileExistsError for an existing target, with
    `overwrite` only if it is not a quantized model.
    """
    target = Path(target).absolute()
    check_path("target", target)
    scheme = scheme_of(model)
    if scheme is None:
        raise ValueError("The model is not quantized: prepare it with quantize = int8 or int4.")
    _check_groups(model, scheme)
    arrays = _flatten(nnx.to_pure_dict(nnx.state(model)))
    metadata = model_metadata(model.config, generation, chat_template, quantized={"scheme": scheme})

    def read(name: str, layer: int | None) -> np.ndarray:
        value = np.asarray(arrays[name] if layer is None else arrays[name][layer])
        return pack(value) if value.dtype == INT4 else value

    with written_whole(target, overwrite, foreign_in_quantized) as partial:
        stored = {name: _stored_as(array.shape, array.dtype) for name, array in arrays.items()}
        orbax.write_params(partial, stored, metadata, read)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER_NAME)
        write_manifest(partial)


def load(
    checkpoint: Path, config: ModelConfig, metadata: Mapping[str, Any], compute: ComputeConfig, mesh: Mesh | None
) -> Baichuan2:
    """Loads the quantized model in a checkpoint with this metadata; each device reads its own shard.

    Raises DamagedCheckpoint, and ValueError for a mesh with too many shards for int4.
    """
    scheme = read_scheme(checkpoint, metadata)
    graphdef, abstract = _abstract(config, compute, mesh, scheme)
    _check_groups(nnx.merge(graphdef, abstract), scheme)
    arrays = open_params(checkpoint, jax.process_index(), jax.process_count())
    expected = {name: _stored_as(x.shape, x.dtype) for name, x in _flatten(abstract).items()}
    shapes = {name: shape for name, (shape, _) in expected.items()}
    hf.check_shapes(f"arrays of {checkpoint}", shapes, {name: array.shape for name, array in arrays.items()})
    for name, (_, dtype) in expected.items():
        # Only arrays that are not quantized may be cast.
        if dtype.kind in "iu" and arrays[name].dtype.numpy_dtype != dtype:
            found = arrays[name].dtype.name
            raise DamagedCheckpoint(f"{checkpoint} is damaged: {name} is {found} and not {dtype.name}.")

    def read(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        part = functools.partial(_read, arrays[_name(path)], x)
        return jax.make_array_from_callback(x.shape, x.sharding, part)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(read, abstract))


def read_scheme(checkpoint: Path, metadata: Mapping[str, Any]) -> Scheme:
    """A checkpoint's quantization scheme; DamagedCheckpoint if it is not known."""
    record = quantized_scheme(metadata)
    scheme: Any = record.get("scheme") if isinstance(record, dict) else None
    if scheme not in get_args(Scheme):
        legal = " and ".join(get_args(Scheme))
        raise DamagedCheckpoint(
            f"{checkpoint}: quantized = {record!r} in its metadata is not known; legal are {legal}."
        )
    return scheme


def foreign_in_quantized(folder: Path) -> list[str]:
    """Names of files in `folder` that `save` did not write; all of them if it is not a quantized model."""
    foreign = foreign_in_checkpoint(folder)
    if folder.is_dir() and is_complete(folder) and quantized_scheme(open_metadata(folder)) is not None:
        return [name for name in foreign if name != MANIFEST_NAME]
    return foreign or [folder.name]


def pack(values: np.ndarray) -> np.ndarray:
    """int4 [..., K] -> uint8 [..., K / 2], rounded up."""
    values = values.astype(np.int8).view(np.uint8)
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    return (values[..., ::2] & 15) | (values[..., 1::2] << 4)


def unpack(packed: np.ndarray, size: int) -> np.ndarray:
    """Inverse of `pack`: [..., size]."""
    signed = packed.view(np.int8)
    halves = np.stack([signed << 4 >> 4, signed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)[..., :size].astype(INT4)


def _stored_as(shape: Shape, dtype: Any) -> tuple[Shape, np.dtype]:
    if dtype == INT4:
        return (*shape[:-1], -(-shape[-1] // 2)), np.dtype(np.uint8)
    return tuple(shape), np.dtype(dtype)


def _read(array: Any, x: jax.ShapeDtypeStruct, index: tuple[slice, ...] | None) -> np.ndarray:
    if x.dtype == INT4:
        # A group is never sharded.
        packed = orbax.read_part(array, None if index is None else (*index[:-1], slice(None)))
        return unpack(packed, x.shape[-1])
    return orbax.read_part(array, index or None).astype(x.dtype, copy=False)


def _abstract(config: ModelConfig, compute: ComputeConfig, mesh: Mesh | None, scheme: Scheme) -> tuple[Any, Any]:
    """(graphdef, abstract parameters) of a quantized model, whose norms are fp32."""
    graphdef = split_model(config, compute)[0]

    def quantize(params: Any) -> tuple[Any, Any]:
        graphdef_of_quantized, state = nnx.split(lay_out(nnx.merge(graphdef, params), quantize=scheme))
        return graphdef_of_quantized, nnx.to_pure_dict(state)

    stored = abstract_params(config, mesh, "float32")
    if mesh is None:
        found, params = jax.eval_shape(quantize, stored)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return found, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    with jax.set_mesh(mesh):
        found, params = jax.eval_shape(quantize, stored)
    return found, place_shapes(mesh, params)


def _check_groups(model: Baichuan2, scheme: Scheme) -> None:
    values: list[Any] = [
        module.weight[...] for _, module in nnx.iter_modules(model.layers) if isinstance(module, Linear)
    ]
    if scheme == "int4" and any(value.groups is None for value in values):
        raise ValueError(
            f"int4 groups support at most {PARTS} devices that shard a weight (mesh.tensor), and this mesh has more: "
            "choose int8."
        )


def _flatten(params: Any) -> dict[str, Any]:
    """Name -> array, such as "layers.mlp.up_proj.weight.scale"."""
    return {_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
