"""TPU generations and the slices that exist."""

from __future__ import annotations

import pytest

from bc2_jax.tpu.chips import CHIPS, DEVICE_KINDS, GIB, parse_topology


@pytest.mark.parametrize(
    "text", ["v5p:4x4x4", "v5p:2x2x1", "v5p:4x4x12", "v5p:16x16x24", "v5e:16x16", "v5e:1x1", "v4:4x8x8", "v6e:8x16"]
)
def test_slices_that_exist(text: str):
    assert parse_topology(text).name == text


@pytest.mark.parametrize(
    "text",
    [
        "v5e:16x32",  # libtpu compiles for it
        "v5e:8x4",  # sides ascend
        "v6e:32x32", "v5p:4x4", "v5p:3x4x4", "v5p:6x6x6", "v5p:8x4x4", "v5p:16x20x28", "v4:16x16x20", "v5e:2x2x2",
    ],
)  # fmt: skip
def test_slices_that_do_not(text: str):
    with pytest.raises(ValueError, match=rf"topology = '{text}' .* legal are .*2x2.*\.$"):
        parse_topology(text)


def test_bad_names_say_what_is_legal():
    with pytest.raises(ValueError, match="must be one of v4, v5e, v5p, v6e, tpu7x"):
        parse_topology("v3:4x4")
    for text in ("v5p", "v5p:", "v5p:64", "v5p:4x4x0", "v5p:4x4x4 ", "v5p:axb"):
        with pytest.raises(ValueError, match="write v5p:AxBxC, for instance v5p:16x16x24"):
            parse_topology(text)
    with pytest.raises(ValueError, match="num_slices = 0"):
        parse_topology("v5p:4x4x4", 0)


def test_counts():
    slices = parse_topology("tpu7x:4x4x8", 2)
    assert (slices.slice_chips, slices.num_chips, slices.num_devices) == (128, 256, 512)
    assert str(slices) == "2 x tpu7x:4x4x8"


def test_rings():
    assert [parse_topology("v5p:2x4x4").is_ring(dim) for dim in range(3)] == [False, True, True]
    assert [parse_topology("v5e:8x16").is_ring(dim) for dim in range(2)] == [False, True]


@pytest.mark.parametrize("name, mxus, size", [("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("tpu7x", 8, 256)])
def test_the_clock_gives_the_documented_peak(name: str, mxus: int, size: int):
    chip = CHIPS[name]
    assert mxus * size**2 * 2 * chip.clock == pytest.approx(chip.peak_flops, rel=0.003)


def test_every_device_kind_is_a_generation():
    assert set(DEVICE_KINDS.values()) == set(CHIPS)
    assert CHIPS[DEVICE_KINDS["TPU v5 lite"]].hbm_bytes == 16 * GIB
