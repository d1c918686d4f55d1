from __future__ import annotations

import io
import pickletools
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.convert.pickled import read_entries, read_pickled
from bc2_jax.convert.pickled_write import write_pickled

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]


def made(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {f"层.{i}": rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}


def write(path, arrays, dtype):
    write_pickled(path, dtype, {name: array.shape for name, array in arrays.items()}, arrays.items())
    return path


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=12), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1)
)
@settings(max_examples=50)
def test_round_trip_keeps_every_byte(tmp_path_factory, shapes, dtype, seed):
    arrays = made(shapes, dtype, seed)
    path = write(tmp_path_factory.mktemp("bin") / "x.bin", arrays, dtype)
    tensors = read_pickled(path)
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        got = tensors[name].read()
        assert tensors[name].strides is None
        assert (got.shape, got.dtype, got.tobytes()) == (array.shape, array.dtype, array.tobytes())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        pickled = archive.read("archive/data.pkl")
    assert all(entry.offset % 64 == 0 for entry in read_entries(path).values())
    pickletools.dis(pickled, out=io.StringIO())


@pytest.mark.parametrize("limit", [100, 1000])
def test_large_entries_and_files(tmp_path, monkeypatch, limit):
    """The format of entries and files of more than 2 GiB, with a limit that is not there yet."""
    arrays = made([(3, 5), (70, 9), (), (0, 2), (1000,)], np.float32)
    small = write(tmp_path / "small.bin", arrays, np.float32)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    large = write(tmp_path / "large.bin", arrays, np.float32)
    monkeypatch.undo()
    assert large.stat().st_size > small.stat().st_size  # the longer headers
    tensors = read_pickled(large)
    assert {name: t.read().tobytes() for name, t in tensors.items()} == {n: a.tobytes() for n, a in arrays.items()}
    assert all(entry.offset % 64 == 0 for entry in read_entries(large).values())
    with zipfile.ZipFile(large) as archive:
        assert archive.testzip() is None


def test_only_one_tensor_is_held(tmp_path):
    alive = []

    def tensors():
        for name in ("a", "b", "c"):
            assert not any(ref() is not None for ref in alive)
            array = np.ones((2, 3), np.float32)
            alive.append(weakref.ref(array))
            yield name, array
            del array

    write_pickled(tmp_path / "x.bin", np.float32, dict.fromkeys("abc", (2, 3)), tensors())
    assert len(alive) == 3


def test_arrays_in_any_layout(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_pickled(tmp_path / "x.bin", np.float32, {"a": (3, 2)}, [("a", array)])
    np.testing.assert_array_equal(read_pickled(tmp_path / "x.bin")["a"].read(), array)


def test_equal_tensors_make_equal_files_whatever_the_name(tmp_path):
    arrays = made([(3, 5), (70,)], np.float16)
    assert write(tmp_path / "a.bin", arrays, np.float16).read_bytes() == (
        write(tmp_path / "b.bin", arrays, np.float16).read_bytes()
    )


def test_integers_beyond_32_bits(tmp_path):
    """Announced only: the pickle is written before the first tensor comes."""
    path = tmp_path / "x.bin"
    with pytest.raises(ValueError, match="the tensor a is missing"):
        write_pickled(path, np.float16, {"a": (2, 2**31)}, [])
    with zipfile.ZipFile(path) as archive:
        arguments = [argument for _, argument, _ in pickletools.genops(archive.read("archive/data.pkl"))]
    assert arguments.count(2**32) == 1 and arguments.count(2**31) == 2


ZEROS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("b", ZEROS)], "b float32 .* is not the tensor expected here"),
        ([("a", ZEROS.T)], r"a float32 \(3, 2\) is not the tensor expected"),
        ([("a", ZEROS.astype(np.float16))], "a float16 .* is not the tensor expected"),
        ([("a", ZEROS)], "the tensor b is missing"),
        ([("a", ZEROS), ("b", ZEROS), ("c", ZEROS)], "c float32 .* is not the tensor expected"),
        ([], "the tensor a is missing"),
    ],
)
def test_tensors_that_are_not_expected(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=rf"x\.bin: {message}"):
        write_pickled(tmp_path / "x.bin", np.float32, {"a": (2, 3), "b": (2, 3)}, tensors)


def test_a_dtype_torch_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="no dtype uint32"):
        write_pickled(tmp_path / "x.bin", np.uint32, {}, [])
