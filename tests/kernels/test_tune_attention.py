"""tools/tune_attention.py, without the compiler: what it counts, which candidate it prints, how it fails."""

from __future__ import annotations

import pytest

from bc2_jax.cli import tune_attention
from bc2_jax.cli.tune_attention import CHIPS, Count, head_cycles, min_cycles
from bc2_jax.kernels.blocks import TABLE


def test_cycles_that_matmuls_need():
    """1024 x 1024 scores of 128: two matmuls forward take 4,096 cycles on v5p, five backward 10,240."""
    assert min_cycles(CHIPS["v5p"], 128, 2 * 1024**2) == 4096
    assert min_cycles(CHIPS["v5p"], 128, 5 * 1024**2) == 10240
    assert min_cycles(CHIPS["v5p"], 64, 2 * 1024**2) == 4096


def test_cycles_of_a_head_count_every_pair_of_blocks_once():
    plain, diagonal = Count(1024, 512, 100, 0), Count(1024, 128, 0, 7)
    assert head_cycles(plain, diagonal, 4096) == 6 * 100 + 4 * 7
    assert head_cycles(plain, diagonal, 1000) == 7


def test_prints_the_line_of_the_best(monkeypatch, capsys):
    cycles = {128: (50, 20), 256: (40, 25), 512: (40, 60)}

    def count(args, kernel, block, chunk, diagonal):
        if chunk == 1024:
            raise RuntimeError("Ran out of memory")
        return cycles[chunk][diagonal]

    monkeypatch.setattr(tune_attention, "count_cycles", count)
    assert tune_attention.main(["--chip", "v5p", "--blocks", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '    _Line("v5p", 128, 4096, BlockSizes(1024, 256, 1024, 512, 128, 16384, 32)),'
    assert sum("does not compile: Ran out of memory" in line for line in lines) == 2


def test_splash_beside_ours(monkeypatch, capsys):
    """Per 1024 x 1024 scores, the best of each kernel; blocks of 512 are a quarter of that."""

    def count(args, kernel, block, chunk, diagonal, splash=False):
        assert args.rope
        if splash and kernel == 1 and chunk == 256:
            raise RuntimeError("Ran out of memory")
        return (1000 + 100 * splash + kernel) * (block // 512) ** 2 + (chunk == 256)

    monkeypatch.setattr(tune_attention, "count_cycles", count)
    argv = ["--chip", "v5p", "--blocks", "512", "1024", "--chunks", "256", "512", "--splash"]
    assert tune_attention.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    ours, theirs = "flash_forward 4,000 (512, 512)", "splash_mha_fwd 4,400 (512, 512)"
    assert f"{ours}, {theirs}, floor of the matmuls 4,096" in lines
    ours, theirs = "flash_backward 4,004 (512, 512)", "splash_mha_dkv 4,404 (512, 512)"
    assert f"{ours}, {theirs}, floor of the matmuls 10,240" in lines


def test_errors(monkeypatch, capsys):
    def count(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(tune_attention, "count_cycles", count)
    assert tune_attention.main(["--chip", "v5e", "--blocks", "512"]) == 1
    assert tune_attention.main(["--chip", "v5e", "--run"]) == 2
    assert "--run needs a TPU, and this machine has none." in capsys.readouterr().err
    assert tune_attention.main(["--chip", "v5e", "--splash"]) == 2
    assert "libtpu counts none for v5e" in capsys.readouterr().err


@pytest.mark.parametrize("chip", CHIPS)
def test_the_table_has_the_memory_that_was_compiled_with(chip: str):
    for line in TABLE:
        if line.chip == chip:
            assert (line.sizes.vmem_mib, line.sizes.span) == (CHIPS[chip].vmem_mib, CHIPS[chip].span)
