"""The notebook: it parses, is short, and each command and option in it exists."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

from bc2_jax.cli import aot_compile, check_hardware
from bc2_jax.cli.configs import run_configs
from bc2_jax.tpu.chips import parse_topology

ROOT = Path(__file__).parents[2]


def code_lines() -> list[str]:
    cells = json.loads((ROOT / "notebooks" / "check_hardware.ipynb").read_text(encoding="utf-8"))["cells"]
    return [
        line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines() if line
    ]


def test_its_python_parses_and_it_is_short():
    lines = code_lines()
    assert 0 < len(lines) <= 10
    ast.parse("\n".join(line for line in lines if line[0] not in "!%"))
    assert any(line.startswith("%pip install") for line in lines)


def test_its_commands_exist():
    commands = [shlex.split(line[1:]) for line in code_lines() if line.startswith("!")]
    assert [command[:2] for command in commands] == [["bc2", "check-hardware"], ["bc2", "estimate"]]
    first = check_hardware.make_parser().parse_args(commands[0][2:])
    second, rest = aot_compile.make_parser().parse_known_args(commands[1][2:])
    assert rest == [] and second.calibrate == first.out
    assert second.config in run_configs() and parse_topology(second.topology).num_chips == 256
