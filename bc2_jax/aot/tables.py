"""Writes the tables of docs/tpu.md from the figures in docs/tpu/*.json.

A file holds the rows of one table, each an object with `cells` (text), `figures` (what `tools/aot_compile.py --json`
wrote) and `arguments` (of the program that compiled it). `recorded` marks figures from an earlier version of the page.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

from bc2_jax.tpu.chips import CHIPS, GIB
from bc2_jax.tpu.rates import KERNEL_CYCLES

_PARTS = " / ".join(f"{{estimated_step_parts[{name}]:.3f}}" for name in ("matmul", "vector", "kernels", "exposed"))
_PARTS_NAME = "matmul / vector / kernels / exposed s"
_STEP = {f"step s = {_PARTS_NAME.removesuffix(' s')}": f"{{estimated_step_seconds:.3f}} = {_PARTS}"}
_MFU = {"MFU (at worst)": "{estimated_mfu:.3f} ({estimated_mfu_low:.3f})"}
_HBM = {"HBM GiB: sum, in use": "{hbm_bytes_per_chip!g:.1f}, {hbm[peak]!g:.1f}"}
_TOKENS = {"tokens/s a chip": "{tokens_per_second_per_chip:,.0f}"}
TABLES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "calibration": (
        ("", "remat"),
        {
            "HBM GiB, in host memory": "{hbm_bytes_per_chip!g:.1f}, {hbm[host]!g:.0f}",
            _PARTS_NAME: _PARTS,
            "MFU (at worst)": "{estimated_mfu_full_square:.3f} ({estimated_mfu_low_full_square:.3f})",
            "published": "{published_mfu_full_square:.3f}",
            "ratio (at worst)": "{ratio:.2f} ({ratio_low:.2f})",
        },
    ),
    "options": (("7B, v5p 4x4x4, 2 sequences a chip",), _STEP | _MFU),
    "splash": (("v5p, RoPE, cycles by chunk",), {size: f"{{chunk_{size}:,}}" for size in ("256", "512", "1024")}),
    "loss": (
        ("",),
        {
            "HBM GiB: sum, in use": "{hbm_bytes_per_chip!g:.1f}, {hbm[peak]!g:.2f}",
            **_STEP,
            **_MFU,
            "loss: matmul + vector ms": "{loss[matmul]!m:.0f} + {loss[vector]!m:.0f}",
            "head gathered / reduced GiB": "{loss[gathered_bytes]!g:.1f} / {loss[reduced_bytes]!g:.1f}",
        },
    ),
    "remat": (
        ("compute.remat",),
        {
            "HBM GiB: sum, in use, in host memory": "{hbm_bytes_per_chip!g:.1f}, {hbm[peak]!g:.1f}, {hbm[host]!g:.1f}",
            **_STEP,
            **_MFU,
            "compile s": "{compile_seconds:.0f}",
        },
    ),
    "presets": (
        ("", "slice", "topology, sequences a chip"),
        _HBM | _MFU | {_PARTS_NAME: _PARTS} | _TOKENS | {"days for 2.6 T tokens": "{days_for_2_6_trillion_tokens:.1f}"},
    ),
    "finetuning": (
        ("", "slice", "topology, rows a chip", "flags"),
        {
            "HBM GiB: sum, laid out, arguments": (
                "{hbm_bytes_per_chip!g:.1f}, {hbm[laid_out]!g:.1f}, {hbm[arguments]!g:.2f}"
            ),
            **_MFU,
            _PARTS_NAME: _PARTS,
            **_TOKENS,
        },
    ),
    "serving": (
        ("", "weights, cache"),
        {
            "slots": "{slots} x {slot_length}",
            "GiB": "{decode[hbm][laid_out]!g:.1f}",
            "first token": "{estimated_seconds_to_first_token!m:.0f} ms",
            "step": "{decode[estimated_seconds]!m:.1f} ms",
            "tokens/s, all slots": "{decode[estimated_tokens_per_second]:,.0f}",
            "share": "{decode[floor_share]:.0%}",
            "tokens/s, one": "{single[estimated_tokens_per_second]:.0f}",
            "share, one": "{single[floor_share]:.0%}",
        },
    ),
    "scoring": (
        ("13B, v5e:2x4",),
        {
            "items": "{items:,}",
            "subjects": "{subjects}",
            "tokens of the shots (assumed)": "{shot_tokens}",
            "of a question (assumed)": "{question_tokens}",
            "rows of 4096": "{rows:.0f}",
            "estimated s": "{estimated_seconds:.0f}",
        },
    ),
}
"""Name of the table and of its file -> (headers of `cells`, header -> format of the figures)."""
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


class _Formatter(string.Formatter):
    """Adds the conversions !g (bytes in GiB) and !m (seconds in ms); None is shown as -."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion in ("g", "m"):
            return None if value is None else value / GIB if conversion == "g" else 1e3 * value
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        return "-" if value is None else super().format_field(value, format_spec)


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table. Raises ValueError for a file that is not a list of rows."""
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all({"cells", "figures"} <= row.keys() for row in rows):
        raise ValueError(f"{path} is not valid: it must be a list of objects with cells and figures.")
    return rows


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes one row per line, floats with 6 digits."""
    lines = ",\n".join(json.dumps(_rounded(row), ensure_ascii=False) for row in rows)
    (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def render_page(page: str, folder: Path) -> str:
    """`page` with each table between `<!-- table: NAME -->` and `<!-- end -->` rendered from FOLDER/NAME.json.

    Raises ValueError unless the page has every table once.
    """
    tables = {"chips": _render_chips(), "attention": _render_attention()}
    show = _Formatter().format
    for name, (headers, columns) in TABLES.items():
        rows = read_rows(folder, name)
        lines = [[*row["cells"], *(show(text, **row["figures"]) for text in columns.values())] for row in rows]
        tables[name] = _markdown([*headers, *columns], lines)
    found = [match[2] for match in _MARKED.finditer(page)]
    if sorted(found) != sorted(tables):
        raise ValueError(f"The page has the tables {', '.join(found)}: it must have each of {', '.join(tables)} once.")
    return _MARKED.sub(lambda match: match[1] + tables[match[2]], page)


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headers, ["---"] * len(headers), *rows))


def _render_chips() -> str:
    chips = CHIPS.values()
    rows = [
        ["bf16 TFLOP/s", *(f"{chip.peak_flops / 1e12:g}" for chip in chips)],
        ["HBM GiB, GB/s", *(f"{chip.hbm_bytes // GIB}, {chip.hbm_bandwidth / 1e9:g}" for chip in chips)],
        ["clock GHz", *(f"{chip.clock / 1e9:g}" for chip in chips)],
        ["link GB/s, torus", *(f"{chip.link_bandwidth / 1e9:g}, {chip.torus_dims}-D" for chip in chips)],
        ["network between slices, GB/s a chip", *(f"{chip.dcn_bandwidth / 1e9:g}" for chip in chips)],
    ]
    return _markdown(["", *CHIPS], rows)


def _render_attention() -> str:
    rows = [
        [f"{k.generation}, {'backward' if k.backward else 'forward'}", f"{k.cycles:,}", f"{k.efficiency:.0%}"]
        for k in KERNEL_CYCLES
    ]
    return _markdown(["", "cycles", "share of peak"], rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_rounded(member) for member in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
