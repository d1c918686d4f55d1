"""What `write_pickled` writes and `read_pickled` reads, against torch itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.convert.checksums import verify_file
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.pickled_write import write_pickled

DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=12),
    st.sampled_from(sorted(DTYPES, key=str)),
    st.booleans(),
)
def test_torch_loads_what_we_write(tmp_path_factory, shapes, dtype, mmap):
    rng = np.random.default_rng(len(shapes))
    arrays = {f"层.{i}": rng.standard_normal(shape).astype(DTYPES[dtype]) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("bin") / "pytorch_model.bin"
    write_pickled(path, DTYPES[dtype], {name: array.shape for name, array in arrays.items()}, arrays.items())
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        tensor = state[name]
        assert tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad
        assert (tuple(tensor.shape), bytes_of(tensor)) == (array.shape, array.tobytes())
        if array.size:
            assert tensor.data_ptr() % 64 == 0
    # and once more through torch's own writer
    again = path.with_name("again.bin")  # `path` may be mapped by what is saved
    torch.save(state, again)
    assert {name: t.read().tobytes() for name, t in read_pickled(again).items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


@pytest.mark.parametrize("crc", [True, False])
def test_files_of_torch_with_and_without_checksums(tmp_path, crc):
    path = tmp_path / "pytorch_model.bin"
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify_file(path) is crc
    tensors = read_pickled(path)
    np.testing.assert_array_equal(tensors["a"].read(), state["a"].numpy())
    assert tensors["b"].read().tobytes() == bytes_of(state["b"].detach())
