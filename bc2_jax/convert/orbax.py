"""Reads and writes the arrays of a checkpoint one layer at a time, through TensorStore.

Orbax handles whole arrays, and an array holds all layers of one weight: 11 GB for 13B. Everything else of the
checkpoint format is left to Orbax.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from bc2_jax.checkpoint import CHUNK_BYTES
from bc2_jax.convert.stream import in_order
from bc2_jax.convert.table import Part, Reader, Shape, parts_of, unflatten
from bc2_jax.files import file_store
from bc2_jax.manifest import DamagedCheckpoint

_WRITES = 3
"""Parts that are written to disk while the next ones are read and transposed."""


def open_arrays(checkpoint: Path) -> dict[str, ts.TensorStore]:
    """Path -> array on disk for a checkpoint's parameters; reads only metadata.

    Raises DamagedCheckpoint if the metadata is not Orbax's or contains a name that could point elsewhere.
    """
    folder = checkpoint / "params"
    names, driver, in_ocdbt = _read_tree(folder / "_METADATA")
    arrays = {}
    for name in names:
        store: dict[str, Any] = (
            {"driver": "ocdbt", "base": file_store(folder), "path": f"{name}/"}
            if in_ocdbt
            else file_store(folder / name)
        )
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}  # a missing chunk is an error
        try:
            arrays[name] = ts.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} cannot be opened ({explain(error)}).") from error
        shape: Any = arrays[name].shape
        chunk: Any = arrays[name].chunk_layout.write_chunk.shape
        # TensorStore allocates a whole chunk and ends the process if it cannot.
        if any(length > size for size, length in zip(shape, chunk, strict=True)):
            raise DamagedCheckpoint(f"{folder} is damaged: {name} of shape {shape} has chunks of shape {chunk}.")
    return arrays


def _read_tree(file: Path) -> tuple[list[str], str, bool]:
    """Array names, their TensorStore driver, and whether they are in one OCDBT database."""
    try:
        metadata = json.loads(file.read_bytes())
        names = [
            ".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()
        ]
        driver, in_ocdbt = "zarr3" if metadata["use_zarr3"] else "zarr", bool(metadata["use_ocdbt"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: it does not describe arrays ({explain(error)}).") from error
    for name in names:
        if not re.fullmatch(r"\w+([.-]\w+)*", name):
            raise DamagedCheckpoint(f"{file} is not valid: {name!r} is not the name of an array.")
    return names, driver, in_ocdbt


def read_part(array: ts.TensorStore, part: int | tuple[slice, ...] | None) -> np.ndarray:
    """One layer of an array on disk, or slices; all of it if `part` is None. Raises DamagedCheckpoint for damaged
    bytes.
    """
    try:
        return (array if part is None else array[part]).read().result()
    except ValueError as error:
        store: Any = array.kvstore
        place = store.path if store.base is None else store.base.path + store.path
        raise DamagedCheckpoint(f"{place.rstrip('/')} is damaged: it cannot be read ({explain(error)}).") from error


def explain(error: BaseException, limit: int = 300) -> str:
    """The innermost cause in one line, without the specs and source locations that TensorStore adds."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = re.split(r"\s*\[(?:tensorstore_spec|source locations|os_error_code)", str(error))[0]
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no {text}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def write_params(
    checkpoint: Path, arrays: Mapping[str, tuple[Shape, np.dtype]], metadata: dict[str, Any], read: Reader
) -> None:
    """Writes a params-only checkpoint of `arrays` (path -> shape, dtype), one layer at a time.

    `read(path, layer)` returns a layer of a stacked array ("layers.*"), or all of another one with layer None; threads
    call it. Every chunk has a CRC32C that TensorStore, and so Orbax, checks on reading. The folder must not exist.
    Raises OSError if an array cannot be written.
    """
    folder = checkpoint / "params"
    chunks = {path: _chunk_shape(path, shape, dtype.itemsize) for path, (shape, dtype) in arrays.items()}
    # Orbax writes the checkpoint with tiny arrays; then each is replaced by one of its true shape.
    tiny = {path: np.zeros((1,) * len(shape), dtype) for path, (shape, dtype) in arrays.items()}
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # one file per chunk: written once, never rewritten or merged
    context.array.saving.enable_write_sharding_file = False
    with context:
        ocp.save_checkpointables(checkpoint, {"params": unflatten(tiny)}, custom_metadata=metadata)
    stores = {}
    for path, (shape, dtype) in arrays.items():
        shutil.rmtree(folder / path)
        spec = {
            "driver": "zarr3",
            "kvstore": file_store(folder / path),
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "fill_value": 0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks[path]}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            # A chunk of zeros is written too: a missing file always means a damaged checkpoint.
            "store_data_equal_to_fill_value": True,
        }
        stores[path] = ts.open(spec, create=True, delete_existing=True).result()
    _correct_shapes(folder, chunks)

    started: deque[tuple[str, ts.WriteFutures]] = deque()

    def write(part: Part) -> None:
        path, layer = part
        target = stores[path] if layer is None else stores[path][layer]
        future = target.write(read(path, layer), can_reference_source_data_indefinitely=True)
        future.commit.force()  # begins at once instead of when it is waited for
        started.append((path, future))

    # Layer by layer, as in the files of a release, so that neighbours are read together.
    parts = parts_of({path: shape for path, (shape, _) in arrays.items()})
    parts.sort(key=lambda part: -1 if part[1] is None else part[1])
    try:
        with contextlib.closing(in_order(write, parts)) as written:
            for _ in written:
                if len(started) > _WRITES:
                    _wait(*started.popleft())
        while started:
            _wait(*started.popleft())
    finally:  # after an error nothing may be written any more: the folder is about to be removed
        for _, future in started:
            future.exception()


def _wait(path: str, future: ts.WriteFutures) -> None:
    """Waits until a part is on disk."""
    try:
        future.result()
    except ValueError as error:
        raise OSError(f"{path} cannot be written ({explain(error)}).") from error


def _chunk_shape(path: str, shape: Shape, itemsize: int) -> Shape:
    """One layer, its first dimension cut into equal parts (the last padded) of at most CHUNK_BYTES."""
    leading: Shape = (1,) if path.startswith("layers.") else ()
    rows, *rest = shape[len(leading) :]
    parts = min(rows, math.ceil(rows * math.prod(rest) * itemsize / CHUNK_BYTES))
    return (*leading, math.ceil(rows / parts), *rest)


def _correct_shapes(folder: Path, chunks: Mapping[str, Shape]) -> None:
    """Replaces the shapes of the tiny arrays in the files where Orbax records them."""
    file = folder / "_METADATA"
    tree = json.loads(file.read_text(encoding="utf-8"))
    for entry in tree["tree_metadata"].values():
        path = ".".join(key["key"] for key in entry["key_metadata"])
        entry["value_metadata"]["write_shape"] = chunks[path]
    file.write_text(json.dumps(tree), encoding="utf-8")
    for file in (folder / "array_metadatas").glob("*"):
        notes = json.loads(file.read_text(encoding="utf-8"))
        for entry in notes["array_metadatas"]:
            note = entry["array_metadata"]
            note["write_shape"] = note["chunk_shape"] = chunks[note["param_name"]]
        file.write_text(json.dumps(notes), encoding="utf-8")
