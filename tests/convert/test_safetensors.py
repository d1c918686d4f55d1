from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.convert.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "rope-tiny" / "model-00001-of-00002.safetensors"


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_round_trip_keeps_every_byte(tmp_path_factory, shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    arrays = {f"t{i}": rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    write_safetensors(path, dtype, {k: a.shape for k, a in arrays.items()}, arrays.items())
    tensors = read_safetensors(path)
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        got = tensors[name].read()
        assert (got.shape, got.dtype, got.tobytes()) == (array.shape, array.dtype, array.tobytes())


def test_reading_is_lazy_and_read_only(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, np.float32, {"a": (2, 3)}, [("a", np.arange(6, dtype=np.float32).reshape(2, 3))])
    array = read_safetensors(path)["a"].read()
    assert type(array) is np.ndarray and not array.flags.owndata and not array.flags.writeable
    path.unlink()  # the mapping outlives the name
    assert array[1, 2] == 5


def test_unaligned_tensor(tmp_path):
    data = b"\x07" + np.float32(1.5).tobytes()
    header = {"flag": entry(0, 1, [1], "U8"), "x": entry(1, 5, [1])}
    path = write_raw(tmp_path / "x.safetensors", header, data)
    assert read_safetensors(path)["x"].read() == [1.5]


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOLDEN.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "not valid JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": {"dtype": "F32"}}, b"", "a has no dtype, shape or data_offsets"),
        ({"a": entry(0, 4, [1], "F4")}, bytes(4), "a has dtype 'F4'"),
        ({"a": entry(0, 4, [-1])}, bytes(4), "expected sizes"),
        ({"a": entry(0, 4, [True])}, bytes(4), "expected sizes"),
        ({"a": entry(0, 4, [2**62] * 1000)}, bytes(4), "expected sizes"),
        ({"a": entry(0, 4, [1] * 100)}, bytes(4), "expected sizes"),
        ({"a": entry(0, 0, [0, 2**62])}, b"", "expected sizes"),
        ({"a": entry(0, 4, [2])}, bytes(4), "do not match"),
        ({"a": entry(4, 0, [1])}, bytes(4), "do not match"),
        ({"a": entry(0, 8, [2])}, bytes(4), "truncated"),
        ({"a": entry(0, 4, [1])}, bytes(5), "truncated or damaged"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), "b starts at byte 4"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "b starts at byte 8"),
    ],
)
def test_malformed_header(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)


def test_writer_refuses_unexpected_tensors(tmp_path):
    path, a = tmp_path / "x.safetensors", np.ones(2, np.float32)
    for tensors in ([], [("b", a)], [("a", a[:1])], [("a", a.astype(np.float16))], [("a", a), ("b", a)]):
        with pytest.raises(ValueError, match="is not the tensor expected here|the tensor a is missing"):
            write_safetensors(path, np.float32, {"a": (2,)}, tensors)
