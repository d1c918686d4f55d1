"""The tables of docs/tpu.md, written from the figures in docs/tpu/*.json.

A file holds the rows of one table, each an object with `cells` (text), `figures` (what `tools/aot_compile.py --json`
wrote) and `arguments` (of the program that compiled it). A row with `recorded` has its figures from an earlier version
of the page, until it is compiled again.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.aot.estimate import KERNEL_CYCLES
from bc2_jax.tpu.chips import CHIPS, GIB

Figures = Mapping[str, Any]
_MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """Columns of text, then columns of figures by name."""

    cells: tuple[str, ...]
    columns: dict[str, Callable[[Figures], str]]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _hbm(f: Figures) -> str:
    # Where host memory is used, the compiler's peak is not that of HBM.
    host = f["hbm"].get("host", 0)
    return f"{_gib(f['hbm_bytes_per_chip'])}, " + (f"- + {_gib(host)} host" if host else _gib(f["hbm"]["peak"]))


def _mfu(f: Figures) -> str:
    return f"{f['estimated_mfu']:.3f} ({f['estimated_mfu_low']:.3f})"


def _parts(f: Figures) -> str:
    return " / ".join(f"{f['estimated_step_parts'][name]:.3f}" for name in ("matmul", "vector", "kernels", "exposed"))


def _step(f: Figures) -> str:
    return f"{f['estimated_step_seconds']:.3f} = {_parts(f)}"


def _tokens(f: Figures) -> str:
    return f"{f['tokens_per_second_per_chip']:,.0f}"


def _compile(f: Figures) -> str:
    return f"{f['compile_seconds']:.0f}"


def _published_hbm(f: Figures) -> str:
    host = f["hbm"].get("host", 0)
    return _gib(f["hbm_bytes_per_chip"]) + (f", host {host / GIB:.0f}" if host else "")


def _loss(f: Figures) -> str:
    return f"{1e3 * f['loss']['matmul']:.0f} + {1e3 * f['loss']['vector']:.0f}"


def _cycles(chunk: str, f: Figures) -> str:
    return f"{f['cycles'][chunk]:,}"


def _serving_gib(f: Figures) -> str:
    return _gib(max(f["extend"]["hbm"]["laid_out"], f["decode"]["hbm"]["laid_out"]))


def _weights(f: Figures) -> str:
    return f"{f['quantize'] or 'bf16'}, {'int8' if f['kv'] == 'int8' else 'bf16'}"


TABLES = {
    "calibration": Table(
        ("", "remat"),
        {
            "HBM GiB": _published_hbm,
            "matmul / vector / kernels / exposed s": _parts,
            "MFU (at worst)": lambda f: (
                f"{f['estimated_mfu_full_square']:.3f} ({f['estimated_mfu_low_full_square']:.3f})"
            ),
            "published": lambda f: f"{f['published_mfu_full_square']:.3f}",
            "ratio (at worst)": lambda f: f"{f['ratio']:.2f} ({f['ratio_low']:.2f})",
        },
    ),
    "options": Table(
        ("7B, v5p 4x4x4, 2 sequences a chip",),
        {"step s = matmul / vector / kernels / exposed": _step, "MFU (at worst)": _mfu},
    ),
    "splash": Table(
        ("v5p, RoPE, cycles by chunk",),
        {chunk: functools.partial(_cycles, chunk) for chunk in ("256", "512", "1024")},
    ),
    "loss": Table(
        ("",),
        {
            "HBM GiB: sum, in use": lambda f: f"{_gib(f['hbm_bytes_per_chip'])}, {f['hbm']['peak'] / GIB:.2f}",
            "step s = matmul / vector / kernels / exposed": _step,
            "MFU (at worst)": _mfu,
            "loss: matmul + vector ms": _loss,
            "head gathered / reduced GiB": lambda f: (
                f"{_gib(f['loss']['gathered_bytes'])} / {_gib(f['loss']['reduced_bytes'])}"
            ),
        },
    ),
    "remat": Table(
        ("compute.remat",),
        {
            "HBM GiB: sum, in use": _hbm,
            "step s = matmul / vector / kernels / exposed": _step,
            "MFU (at worst)": _mfu,
            "compile s": _compile,
        },
    ),
    "presets": Table(
        ("", "slice", "topology, sequences a chip"),
        {
            "HBM GiB: sum, in use": _hbm,
            "MFU (at worst)": _mfu,
            "matmul / vector / kernels / exposed s": _parts,
            "tokens/s a chip": _tokens,
            "days for 2.6 T tokens": lambda f: f"{f['days_for_2_6_trillion_tokens']:.1f}",
        },
    ),
    "finetuning": Table(
        ("", "slice", "topology, rows a chip", "flags"),
        {
            "HBM GiB: sum, laid out": lambda f: f"{_gib(f['hbm_bytes_per_chip'])}, {_gib(f['hbm']['laid_out'])}",
            "arguments GiB": lambda f: f"{f['hbm']['arguments'] / GIB:.2f}",
            "MFU (at worst)": _mfu,
            "matmul / vector / kernels / exposed s": _parts,
            "tokens/s a chip": _tokens,
        },
    ),
    "serving": Table(
        ("",),
        {
            "weights, cache": _weights,
            "slots": lambda f: f"{f['slots']} x {f['slot_length']}",
            "GiB": _serving_gib,
            "first token": lambda f: f"{1e3 * f['estimated_seconds_to_first_token']:.0f} ms",
            "step": lambda f: f"{1e3 * f['decode']['estimated_seconds']:.1f} ms",
            "tokens/s, all slots": lambda f: f"{f['decode']['estimated_tokens_per_second']:,.0f}",
            "share": lambda f: f"{f['decode']['floor_share']:.0%}",
            "tokens/s, one": lambda f: f"{f['single']['estimated_tokens_per_second']:.0f}",
            "share, one": lambda f: f"{f['single']['floor_share']:.0%}",
        },
    ),
    "scoring": Table(
        ("13B, v5e:2x4",),
        {
            "items": lambda f: f"{f['items']:,}",
            "subjects": lambda f: f"{f['subjects']}",
            "tokens of the shots (assumed)": lambda f: f"{f['shot_tokens']}",
            "of a question (assumed)": lambda f: f"{f['question_tokens']}",
            "rows of 4096": lambda f: f"{f['rows']:.0f}",
            "estimated s": lambda f: f"{f['estimated_seconds']:.0f}",
        },
    ),
}  # fmt: skip
"""Name of the table and of its file -> columns."""


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table. Raises ValueError for a file that is not a list of rows."""
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all({"cells", "figures"} <= row.keys() for row in rows):
        raise ValueError(f"{path} is not valid: it must be a list of objects with cells and figures.")
    return rows


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One row a line, floats to 6 digits."""
    lines = ",\n".join(json.dumps(_rounded(row), ensure_ascii=False) for row in rows)
    (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def render_page(page: str, folder: Path) -> str:
    """`page` with each table between `<!-- table: NAME -->` and `<!-- end -->` written again from FOLDER/NAME.json.

    Raises ValueError unless the page has every table once.
    """
    names = [match[1] for match in _MARKED.finditer(page)]
    known = sorted([*TABLES, *_FROM_CODE])
    if sorted(names) != known:
        raise ValueError(f"The page has the tables {', '.join(names)}: it must have each of {', '.join(known)} once.")
    return _MARKED.sub(lambda match: f"{match[1]}{match[2]}{_render(match[1], folder)}", page)


def _render(name: str, folder: Path) -> str:
    if name in _FROM_CODE:
        return _FROM_CODE[name]()
    table = TABLES[name]
    rows = read_rows(folder, name)
    lines = [[*row["cells"], *(show(row["figures"]) for show in table.columns.values())] for row in rows]
    return _markdown([*table.cells, *table.columns], lines)


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headers, ["---"] * len(headers), *rows))


def _chips() -> str:
    chips = CHIPS.values()
    rows = {
        "bf16 TFLOP/s": [f"{chip.peak_flops / 1e12:g}" for chip in chips],
        "HBM GiB, GB/s": [f"{chip.hbm_bytes // GIB}, {chip.hbm_bandwidth / 1e9:g}" for chip in chips],
        "clock GHz": [f"{chip.clock / 1e9:g}" for chip in chips],
        "link GB/s, torus": [f"{chip.link_bandwidth / 1e9:g}, {chip.torus_dims}-D" for chip in chips],
        "network between slices, GB/s a chip": [f"{chip.dcn_bandwidth / 1e9:g}" for chip in chips],
    }
    return _markdown(["", *CHIPS], [[name, *cells] for name, cells in rows.items()])


def _attention() -> str:
    rows = [
        [
            f"{kernel.generation}, {'backward' if kernel.backward else 'forward'}",
            f"{kernel.cycles:,}",
            f"{kernel.efficiency:.0%}",
        ]
        for kernel in KERNEL_CYCLES
    ]
    return _markdown(["", "cycles", "share of peak"], rows)


_FROM_CODE = {"chips": _chips, "attention": _attention}
"""Tables of constants of this package."""


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_rounded(member) for member in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
