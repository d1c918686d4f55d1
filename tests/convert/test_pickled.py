from __future__ import annotations

import collections
import io
import os
import pickle
import random
import sys
import time
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.safetensors import read_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
SHARD = GOLDEN / "rope-tiny" / "pytorch_model-00001-of-00002.bin"
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Storage:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


class Tensor:
    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple, parameter: bool = False) -> None:
        self.arguments, self.parameter = (storage, offset, shape, strides, False, collections.OrderedDict()), parameter

    def __reduce__(self):
        torch = sys.modules["torch._utils"]
        if not self.parameter:
            return torch._rebuild_tensor_v2, self.arguments
        return torch._rebuild_parameter, (Tensor(*self.arguments[:4]), True, collections.OrderedDict())


def tensor(key: str, array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    return Tensor(Storage(key, array), 0, array.shape, tuple(s // array.itemsize for s in array.strides))


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes what torch.save would, through modules that only have torch's names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, types.FunctionType((lambda: None).__code__, {}, name))
        getattr(utils, name).__module__, getattr(utils, name).__qualname__ = "torch._utils", name
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def write(value: object, protocol: int = 2, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
        storages: dict[str, bytes] = {}

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: object):
                if not isinstance(obj, Storage):
                    return None
                storages[f"data/{obj.key}"] = obj.array.tobytes()
                return "storage", getattr(torch, STORAGES[obj.array.dtype.name]), obj.key, "cpu", obj.array.size

        buffer = io.BytesIO()
        Pickler(buffer, protocol).dump(value)
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in {"data.pkl": buffer.getvalue(), "byteorder": b"little", **storages, **entries}.items():
                archive.writestr(f"archive/{name}", data)
        return path

    return write


def write_pickle(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(16))
    return path


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
@pytest.mark.parametrize("shard", [1, 2])
def test_golden_equals_safetensors(name, shard):
    pickled = read_pickled(GOLDEN / name / f"pytorch_model-0000{shard}-of-00002.bin")
    expected = read_safetensors(GOLDEN / name / f"model-0000{shard}-of-00002.safetensors")
    assert pickled.keys() == expected.keys() and len(pickled) > 0
    for key in pickled:
        a, b = pickled[key].read(), expected[key].read()
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dtypes_and_protocols(save, protocol):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal((3, 4)).astype(dtype)
        for name, dtype in {"a": np.float32, "b": np.float16, "c": ml_dtypes.bfloat16, "d": np.int64}.items()
    }
    state = collections.OrderedDict((k, tensor(str(i), a)) for i, (k, a) in enumerate(arrays.items()))
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    for name, got in read_pickled(save(state, protocol)).items():
        assert got.dtype == arrays[name].dtype and got.read().tobytes() == arrays[name].tobytes()


def test_views_shared_storages_and_parameters(save):
    base = np.arange(24, dtype=np.float32)
    storage = Storage("0", base)
    path = save(
        {
            "whole": Tensor(storage, 0, (4, 6), (6, 1)),
            "transposed": Tensor(storage, 0, (6, 4), (1, 6)),
            "rows": Tensor(storage, 6, (2, 6), (6, 1)),
            "strided": Tensor(storage, 1, (2, 3), (12, 2)),
            "expanded": Tensor(storage, 5, (3, 2), (0, 1)),
            "scalar": Tensor(storage, 23, (), ()),
            "empty": Tensor(storage, 24, (0, 6), (6, 1)),
            "parameter": Tensor(storage, 0, (24,), (1,), parameter=True),
        }
    )
    got = {name: tensor.read() for name, tensor in read_pickled(path).items()}
    matrix = base.reshape(4, 6)
    np.testing.assert_array_equal(got["whole"], matrix)
    np.testing.assert_array_equal(got["transposed"], matrix.T)
    np.testing.assert_array_equal(got["rows"], matrix[1:3])
    np.testing.assert_array_equal(got["strided"], [[1, 3, 5], [13, 15, 17]])
    np.testing.assert_array_equal(got["expanded"], [[5, 6]] * 3)
    np.testing.assert_array_equal(got["parameter"], base)
    assert got["scalar"] == 23 and got["empty"].shape == (0, 6)
    assert not any(array.flags.writeable for name, array in got.items() if name != "empty")


WRAPPERS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model beside an optimizer": lambda state: {
        "optimizer": {
            "state": {0: {"step": 7, "exp_avg": state["a"]}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 1)}],
        },
        "model": state,
        "args": {"names": ["x", "y"], "nothing": None, "yes": True},
    },
    "twice": lambda state: {"step": 2**40, "module": {"state_dict": state, "loss": -0.5}},
    "any name": lambda state: {"weights_of_mine": state},
    "entries beside tensors": lambda state: {
        "global_step": 5,
        **state,
        "names": ["a"],
        "scheduler": {"last_lr": [0.1]},
    },
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_model_among_other_things(save, caplog, name, protocol):
    """What trainers save: the state dict in a dict, or numbers beside the tensors; what is left out is said."""
    arrays = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    state = {key: tensor(key, array) for key, array in arrays.items()}
    value = WRAPPERS[name](state)
    got = read_pickled(save(value, protocol))
    assert {key: t.read().tobytes() for key, t in got.items()} == {key: a.tobytes() for key, a in arrays.items()}
    left_out = {"global_step", "names", "scheduler"} if "beside tensors" in name else value.keys() - {
        "state_dict", "model", "module", "weights_of_mine"
    }  # fmt: skip
    assert all(repr(key) in caplog.text for key in left_out)
    assert bool(caplog.records) == (name != "any name")


def test_it_must_be_clear_which_is_the_model(save):
    one, two = {"a": tensor("0", np.zeros(4, np.float32))}, {"a": tensor("1", np.zeros(4, np.float32))}
    with pytest.raises(ValueError, match="tensors in several dicts, 'generator'; 'critic': save the model's alone"):
        read_pickled(save({"generator": one, "critic": two, "step": 1}))
    with pytest.raises(ValueError, match="its entry 'step' is not a tensor"):
        read_pickled(save({"step": 1, "model": {"step": 2}}))


def test_a_dict_named_from_everywhere_is_looked_through_once(tmp_path):
    """Four levels of a thousand references each to the level below."""

    def key(text: str) -> bytes:
        return b"X" + len(text).to_bytes(4, "little") + text.encode()

    levels = [b"}q\x00"]
    for level in range(4):
        references = (key(f"{i}") + b"h" + bytes([level]) for i in range(1000))
        levels.append(b"}(" + b"".join(references) + b"uq" + bytes([level + 1]))
    entries = (key(f"level {i}") + level for i, level in enumerate(levels))
    pickled = b"}(" + b"".join(entries) + b"u"
    begin = time.thread_time()
    with pytest.raises(ValueError, match="is not a tensor"):
        read_pickled(write_pickle(tmp_path / "x.bin", pickled + b"."))
    assert time.thread_time() - begin < 2


class Malicious:
    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["entry", "whole"])
def test_malicious_pickle_is_refused(tmp_path, protocol, place):
    marker = tmp_path / "executed"
    attack = pickle.dumps({"x": Malicious(marker)} if place == "entry" else Malicious(marker), protocol)
    path = write_pickle(tmp_path / "pytorch_model.bin", attack)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refusing its pickle, it (asks for posix\.system|uses)"):
        read_pickled(path)
    assert not marker.exists()
    pickle.loads(attack)  # the attack is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", r"builtins\.eval"),
        (b"ctorch.hub\nload\n.", r"torch\.hub\.load"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the attributes"),
        (b"ccollections\nOrderedDict\n(X\x01\x00\x00\x00atR.", "with unexpected arguments"),
        (b"ctorch\nFloatStorage\n)R.", r"calls torch\.FloatStorage"),
        (b"}X\x01\x00\x00\x00aK\x01s.", "'a' is not a tensor"),
        (b"}K\x01K\x01s.", "its entry 1 is not a tensor"),
        (b"}G?\xf0\x00\x00\x00\x00\x00\x00K\x01s.", "not a string"),
        (b"}\x88K\x01s.", "not a string"),
        (b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x01u.", "two entries 'a'"),
        (b"K\x01.", "not a dict"),
        (b"}", "malformed"),
        (b".", "malformed"),
        (b"h\x05.", "malformed"),
        (b"\xff", "malformed"),
        (b")" + b"\x85" * 200_000 + b"Q.", "malformed"),
        (b"(cos\nsystem\nX\x02\x00\x00\x00lso.", r"os\.system"),
        (b"ctorch\nFloatStorage\n)\x81.", "opcode NEWOBJ"),
        (b"]K\x01a.", "not a dict"),
        (b"}K\x01a.", "appends to something that is not a list"),
        (b"\x8b\xff\xff\xff\x7f\xff.", "malformed"),
        (b"L" + b"9" * 100_000 + b"L\n.", "malformed"),
        (b"\x8d" + b"\x80" * 8 + b"x.", "malformed"),
        (b"}q\x00X\x01\x00\x00\x00ah\x00s.", "'a' is not a tensor"),
        (b"c\x1b[2Jos\nsystem\n.", r"asks for \\x1b\[2Jos\.system"),
    ],
)
def test_hostile_pickles(tmp_path, pickled, message):
    path = write_pickle(tmp_path / "x.bin", pickled)
    with pytest.raises(ValueError, match=rf"x\.bin: refusing its pickle, .*{message}"):
        read_pickled(path)


# Each level is a tuple of the level before, twice: a few bytes of pickle that would print as 2**60 pairs of brackets.
BOMB = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60


@pytest.mark.parametrize(
    "pickled",
    [
        BOMB + b")R.",
        BOMB + b"(h\x00h\x00h\x00h\x00h\x00tQ.",
        BOMB + b"h\x00\x93.",
        BOMB + b"ctorch._utils\n_rebuild_tensor_v2\nh\x00R.",
        b"}X\x40\x42\x0f\x00" + b"k" * 1_000_000 + b"K\x01s.",
        b"S" + b"k" * 1_000_000 + b"\n.",
    ],
)
def test_refusing_is_quick_and_short(tmp_path, pickled):
    with pytest.raises(ValueError, match="refusing its pickle") as error:
        read_pickled(write_pickle(tmp_path / "x.bin", pickled))
    assert len(str(error.value)) < 500


def test_a_pickle_that_would_fill_memory(tmp_path):
    with pytest.raises(ValueError, match=r"x\.bin: the zip entry 'archive/data\.pkl' has 20000001 bytes, more than"):
        read_pickled(write_pickle(tmp_path / "x.bin", b"}" * 20_000_000 + b"."))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (True, (1,), (1,)),
        (0, (1,), (2**61,)),
        (0, (1,), (2**200,)),
        (0, (0, 2**63), (1, 1)),
        (0, (2**62,), (0,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (1,) * 100, (1,) * 100),
        (0, (2,) * 100_000, (0,) * 100_000),
        (0, ((1, 2), (3,)), (1, 1)),
    ],
)
def test_tensor_outside_its_storage(save, offset, shape, strides):
    path = save({"a": Tensor(Storage("0", np.zeros(4, np.float32)), offset, shape, strides)})
    with pytest.raises(ValueError, match="refusing its pickle, it has a tensor of shape"):
        read_pickled(path)


def test_tensor_with_attributes(save):
    whole = tensor("0", np.zeros(4, np.float32))
    whole.arguments += ({},)
    assert read_pickled(save({"a": whole}))["a"].shape == (4,)
    whole.arguments = (*whole.arguments[:-1], {"neg": True})
    with pytest.raises(ValueError, match="refusing its pickle, it has a tensor with attributes"):
        read_pickled(save({"a": whole}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["archive/data/0", "other/data/0"], "two zip entries named 'data/0'"),
        (["archive/data/0", "archive/data/0\0.txt"], "two zip entries named 'data/0'"),
        (["../../data/0"], "storage '0' is not in the file"),
    ],
)
def test_names_of_zip_entries(save, names, message):
    path = save({"a": tensor("0", np.zeros(4, np.float32))})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name in names:
            info = zipfile.ZipInfo("archive/data/0")
            info.filename = info.orig_filename = name  # the constructor would tidy it up
            archive.writestr(info, bytes(16))
    with pytest.raises(ValueError, match=message):
        read_pickled(path)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("data.pkl", 16, b"\1\2\3\4", "entry 'archive/data.pkl' does not have the CRC-32 it should have"),
        ("data/0", 10, b"\x63\0", "is compressed or encrypted"),
        ("data/0", 8, b"\1", "is compressed or encrypted"),
        ("data/0", 20, b"\0\0\0\x70\0\0\0\x70", "is truncated: the zip entry 'archive/data/0' goes past the end"),
        ("data/0", 20, b"\xff" * 8, "is truncated"),
        ("data/0", 42, b"\xf0\xff\xff\xff", "entry 'archive/data/0' is not where the directory says"),
        ("data/0", 42, b"\0\0\0\0", "entry 'archive/data/0' is not where the directory says"),
    ],
)
def test_lies_of_the_zip_directory(save, name, at, value, message):
    path = save({"a": tensor("0", np.zeros(4, np.float32))})
    content = bytearray(path.read_bytes())
    entry = content.rindex(f"archive/{name}".encode()) - 46
    content[entry + at : entry + at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pickled(path)


def test_storage_of_the_wrong_size_or_missing(save):
    state = {"a": tensor("0", np.zeros(4, np.float32))}
    with pytest.raises(ValueError, match="storage '0' has 15 bytes, expected 4 x float32"):
        read_pickled(save(state, **{"data/0": bytes(15)}))
    path = save(state)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(ValueError, match="storage '0' is not in the file"):
        read_pickled(path)


def test_compressed_and_big_endian(save):
    state = {"a": tensor("0", np.zeros(400, np.float32))}
    with pytest.raises(ValueError, match="compressed"):
        read_pickled(save(state, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="big-endian"):
        read_pickled(save(state, byteorder=b"big"))


def test_legacy_format(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(ValueError, match=r"x\.bin has the legacy format"):
        read_pickled(path)


@pytest.mark.parametrize("keep", [0, 100, 5000, -1000, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "x.bin"
    path.write_bytes(SHARD.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.bin is truncated"):
        read_pickled(path)


def test_damaged_files_never_raise_anything_but_valueerror(tmp_path):
    original, rng, path = SHARD.read_bytes(), random.Random(0), tmp_path / "x.bin"
    directory = original.rindex(b"PK\x05\x06") - 1500
    regions = [range(1200), range(directory, len(original))]
    refused = 0
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.choice(rng.choice(regions))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_pickled(path)
        except ValueError as error:
            assert "x.bin" in str(error)
            refused += 1
    assert refused > 100
