from __future__ import annotations

import pytest

from bc2_jax.tpu.tiles import scatterable_columns


# Found by compiling for v5p: whether a gradient of as many columns over as many shards is scattered as it is.
@pytest.mark.parametrize(
    ("rows", "columns", "shards", "padded"),
    [
        (4096, 11008, 16, 11008), (4096, 11008, 32, 11008), (4096, 11008, 64, 11264), (5120, 13696, 16, 13824),
        (5120, 13696, 32, 13824), (5120, 13696, 64, 13824), (5120, 13824, 64, 13824), (4096, 11520, 64, 11520),
        (64, 1408, 16, 1408), (4096, 11008, 1, 11008),
    ],
)  # fmt: skip
def test_columns_that_libtpu_can_scatter(rows: int, columns: int, shards: int, padded: int):
    assert scatterable_columns(rows, columns, shards) == padded
