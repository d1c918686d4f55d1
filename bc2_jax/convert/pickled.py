"""Reads `pytorch_model*.bin` without torch and without executing the pickle inside.

The file is a zip of a pickled state dict (data.pkl) and one uncompressed entry per storage (data/0, ...). A pickle is a
program that unpickling executes. `_StateDict` instead walks the opcodes, keeps global names as plain text, interprets
the few that a state dict of tensors needs, and cannot call anything. This is stricter than restricting
`pickle.Unpickler`, which still lets a file change attributes of the globals it may name.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickletools
import reprlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from bc2_jax.convert.mapped import TORCH_DTYPES, MappedTensor, contiguous_strides
from bc2_jax.validation import join_some

_log = logging.getLogger(__name__)
STORAGES = {storage: dtype for dtype, (_, storage) in TORCH_DTYPES.items()}
ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {*STORAGES, ORDERED_DICT, TENSOR, _PARAMETER}
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number that starts torch's pre-1.6 format
# A pickle can request 64 bytes of memory per byte. This allows some 20,000 tensors per file.
_MAX_PICKLE = 4 << 20
# No parameter has more dimensions or elements; numpy's own limits are slightly higher.
_MAX_RANK, _MAX_SIZE = 32, 1 << 48


class RefusedFile(ValueError):
    """The file is damaged or contains more than a state dict of tensors."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A zip entry stored uncompressed."""

    name: str
    offset: int
    size: int
    crc: int | None  # CRC-32 of the bytes; None if the file was written without checksums


def read_pickled(path: Path) -> dict[str, MappedTensor]:
    """Name -> tensor of a `torch.save`d state dict in the zip format; reads only the pickle.

    Shared storages and strided views are supported. The state dict may be inside a dict (`find_tensors`); other entries
    are left out and logged. Raises RefusedFile with the file's name if the file is truncated, legacy, big-endian or
    compressed, if the pickle contains anything but tensors and plain values in dicts and lists, or if a tensor exceeds
    its storage.
    """
    entries = read_entries(path)
    if "data.pkl" not in entries:
        raise RefusedFile(f"{path} is a zip file without data.pkl, not a torch.save file.")
    if "byteorder" in entries and _read_entry(path, entries["byteorder"]) != b"little":
        raise RefusedFile(f"{path} was written on a big-endian machine.")
    storages = {
        name.removeprefix("data/"): (entry.offset, entry.size)
        for name, entry in entries.items()
        if name.startswith("data/")
    }
    parser = _StateDict(path, storages)
    value = parser.parse(_read_entry(path, entries["data.pkl"]))
    try:
        tensors, left_out = find_tensors(value)
    except ValueError as error:
        parser.refuse(str(error))
    if left_out:
        _log.warning("%s: ignored, as they are not tensors of the model: %s.", path, join_some(map(_show, left_out)))
    return tensors


# Common names of the model in a training program's checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params")
_DEEPEST_WRAPPER = 4


def find_tensors(value: Any, depth: int = 0) -> tuple[dict[str, MappedTensor], list[str]]:
    """(name -> tensor of the model, names of other entries) of a file's content.

    The content is a dict of tensors, or contains one under a name in _WRAPPERS or as its only dict of tensors. Raises
    ValueError if it is ambiguous.
    """
    if not isinstance(value, dict) or depth > _DEEPEST_WRAPPER:
        raise ValueError("it is not a dict of tensors")
    tensors = {name: entry for name, entry in value.items() if isinstance(entry, MappedTensor)}
    if tensors:
        if bad := [name for name in tensors if not isinstance(name, str)]:
            raise ValueError(f"the name {_show(bad[0])} of a tensor is not a string")
        return tensors, [str(name) for name in value if name not in tensors]
    seen: set[int] = set()
    inside = [name for name, entry in value.items() if _holds_tensors(entry, depth, seen)]
    known = [name for name in inside if name in _WRAPPERS]
    if len(known) == 1 or len(inside) == 1:
        (chosen,) = known if len(known) == 1 else inside
        found, left_out = find_tensors(value[chosen], depth + 1)
        return found, [str(name) for name in value if name != chosen] + [f"{chosen}.{name}" for name in left_out]
    if inside:
        raise ValueError(f"it has tensors in several dicts, {join_some(map(_show, inside))}: save the model's alone")
    if value:
        raise ValueError(f"its entry {_show(next(iter(value)))} is not a tensor")
    return {}, []


def _holds_tensors(value: Any, depth: int, seen: set[int]) -> bool:
    """`seen`: dicts already searched; a small file can refer to one dict from a million places."""
    if not isinstance(value, dict) or depth >= _DEEPEST_WRAPPER or id(value) in seen:
        return False
    if any(isinstance(entry, MappedTensor) for entry in value.values()):
        return True
    seen.add(id(value))
    return any(_holds_tensors(entry, depth + 1, seen) for entry in value.values())


def read_entries(path: Path) -> dict[str, Entry]:
    """Name in the archive's folder (data.pkl, data/0, ...) -> entry of a `torch.save` file.

    Raises RefusedFile if it cannot be mapped (see `read_pickled`).
    """
    with path.open("rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise RefusedFile(
                f"{path} has the legacy format of torch before 1.6; load it with torch.load(weights_only=True) and "
                "save it again."
            )
        try:
            with zipfile.ZipFile(file) as archive:
                return _find_entries(path, file, archive.infolist())
        except RefusedFile:
            raise
        except (zipfile.BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, struct.error) as error:
            raise RefusedFile(f"{path} is truncated or not a torch.save file ({error}).") from error


def _find_entries(path: Path, file: BinaryIO, infos: list[zipfile.ZipInfo]) -> dict[str, Entry]:
    end = path.stat().st_size
    # torch.serialization.set_crc32_options(False) leaves every checksum 0.
    checked = any(info.CRC for info in infos if info.file_size)
    entries: dict[str, Entry] = {}
    for info in infos:
        # All entries are in one folder, named after the original file.
        name = info.filename.partition("/")[2]
        if name in entries:
            raise RefusedFile(f"{path} has two zip entries named {_show(name)}.")
        # Flag 1: encrypted. A compressed entry cannot be mapped and could unpack to any size.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise RefusedFile(f"{path}: the zip entry {_show(info.filename)} is compressed or encrypted.")
        offset = _data_offset(path, file, info)
        if offset + info.file_size > end:
            raise RefusedFile(
                f"{path} is truncated: the zip entry {_show(info.filename)} goes past the end of the file."
            )
        entries[name] = Entry(info.filename, offset, info.file_size, info.CRC if checked else None)
    return entries


def _data_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Start of an entry's bytes: after its local header, which records its own length."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) == 30 and header[:4] == b"PK\x03\x04":
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        name = file.read(name_length).decode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if name == info.orig_filename:
            return info.header_offset + 30 + name_length + extra_length
    raise RefusedFile(f"{path} is damaged: the zip entry {_show(info.filename)} is not where the directory says.")


def _read_entry(path: Path, entry: Entry) -> bytes:
    if entry.size > _MAX_PICKLE:
        raise RefusedFile(f"{path}: the zip entry {_show(entry.name)} has {entry.size} bytes, more than {_MAX_PICKLE}.")
    with path.open("rb") as file:
        file.seek(entry.offset)
        data = file.read(entry.size)
    if entry.crc is not None and zlib.crc32(data) != entry.crc:
        raise RefusedFile(
            f"{path} is damaged: the zip entry {_show(entry.name)} does not have the CRC-32 it should have."
        )
    return data


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 80, 80


def _show(value: Any) -> str:
    """repr(value), but short and printable whatever the file contains: nested tuples can have an endless repr."""
    return _REPR.repr(value)


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    offset: int
    count: int


class _Mark:
    """Start of a variable-length group on the stack."""


class _StateDict:
    """Interprets a pickle's opcodes as the description of a state dict."""

    def __init__(self, path: Path, storages: dict[str, tuple[int, int]]) -> None:
        self.path = path
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, why: str) -> NoReturn:
        raise RefusedFile(f"{self.path}: refusing its pickle, {why}.")

    def parse(self, pickled: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(pickled):
                self.step(opcode.name, argument)
            (result,) = self.stack
        except RefusedFile:
            raise
        except (IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            self.refuse(f"it is malformed ({type(error).__name__}: {_show(str(error))[1:-1]})")
        return result

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_Mark())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode == "APPEND" else self.pop_to_mark()
                if not isinstance(stack[-1], list):
                    self.refuse("it appends to something that is not a list")
                stack[-1].extend(values)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(opcode[-1]))])))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.find_global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(name, str):
                    self.refuse("it asks for something whose name is not a string")
                stack.append(self.find_global(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(self.find_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.rebuild(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BUILD":
                stack.pop()  # attributes of a state dict: version numbers of its modules
                if not isinstance(stack[-1], dict):
                    self.refuse("it sets the attributes of an object")
            case _:
                self.refuse(f"it uses the opcode {opcode}, which no state dict of tensors needs")

    def pop_to_mark(self) -> list[Any]:
        values = []
        while not isinstance(value := self.stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            self.refuse("it sets items of something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # optimizers number their parameters
                self.refuse("it has a key that is not a string")
            if key in target:
                self.refuse(f"it has two entries {_show(key)}")
            target[key] = value

    def find_global(self, name: str) -> _Global:
        if name not in _GLOBALS:
            self.refuse(
                f"it asks for {_show(name)[1:-1]}, which no state dict of tensors needs and which might run code"
            )
        return _Global(name)

    def find_storage(self, persistent_id: Any) -> _Storage:
        kind, storage_type, key, _, count = persistent_id
        dtype = STORAGES.get(storage_type.name) if isinstance(storage_type, _Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int:
            self.refuse(f"it has the unknown storage {_show(persistent_id)}")
        if key not in self.storages:
            self.refuse(f"its storage {_show(key)} is not in the file")
        offset, size = self.storages[key]
        if size != count * dtype.itemsize:
            self.refuse(f"its storage {_show(key)} has {size} bytes, expected {count} x {dtype}")
        return _Storage(dtype, offset, count)

    def rebuild(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global(name=name), () if name == ORDERED_DICT:
                return {}
            case _Global(name=name), (MappedTensor() as tensor, *_) if name == _PARAMETER:
                return tensor
            case _Global(name=name), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if (
                name == TENSOR
            ):
                # After requires_grad and hooks torch 2 may add attributes, such as that the values are negated.
                if any(rest[2:]):
                    self.refuse("it has a tensor with attributes")
                return self.make_tensor(storage, offset, shape, strides)
        called = function.name if isinstance(function, _Global) else _show(function)
        self.refuse(f"it calls {called} with unexpected arguments")

    def make_tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> MappedTensor:
        where = f"a tensor of shape {_show(shape)} with strides {_show(strides)}"
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in sizes):
            self.refuse(f"it has {where} at {_show(offset)}")
        if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) >= _MAX_SIZE:
            self.refuse(f"it has {where}, which is too large")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.count:
            self.refuse(f"it has {where} that reaches outside its storage")
        itemsize = storage.dtype.itemsize
        kept = None if strides == contiguous_strides(shape) else strides
        return MappedTensor(self.path, storage.offset + offset * itemsize, storage.dtype, shape, kept)
