"""Printed hints can be pasted, and names are printed unchanged."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bc2_jax.config import SampleConfig
from bc2_jax.terminal import command, make_console
from bc2_jax.train import results
from tests.meshes import one_device_mesh

ROOT = Path(results.__file__).parents[2]


@pytest.mark.parametrize("place", [ROOT, Path("/")], ids=str)
def test_hints_can_be_typed_where_they_were_printed(small_run, monkeypatch, place):
    monkeypatch.chdir(place)
    said: list[str] = []
    start = SimpleNamespace(say=said.append, command=command("train.py", "my config.py", "--name", "a b"))
    workdir = Path("/tmp/it's [v1] $HOME")
    results.print_hints(small_run, workdir / "checkpoints" / "4", None, start)
    hints = {line[:12].strip(): shlex.split(line[13:]) for line in said if line.startswith("to ")}
    interpreters, programs = {words[0] for words in hints.values()}, [words[1] for words in hints.values()]
    assert len(interpreters) == 1
    assert all(Path(program).resolve().is_file() for program in programs)
    assert Path(programs[0]).resolve() == ROOT / "train.py"
    assert hints["to resume"][2:5] == ["my config.py", "--name", "a b"]
    assert hints["to resume"][5:9] == ["--workdir", str(workdir), "--resume", "auto"]
    assert hints["to convert"][2:] == ["to-hf", str(workdir / "checkpoints" / "4"), str(workdir / "hf")]
    assert hints["to generate"][2:4] == [str(workdir), "--prompt"]
    (interpreter,) = interpreters
    assert Path(interpreter).absolute() == Path(sys.executable) or "/" not in interpreter


def test_names_are_no_markup(small_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = dataclasses.replace(small_run, name="[red]run[/red] :smile: " + "x" * 100 + "END")
    results.print_tables(make_console(), run, one_device_mesh())
    shown = capsys.readouterr().out
    assert run.name in shown.replace("\n", "")


def test_samples_name_what_the_tokenizer_has(small_run, monkeypatch, tokenizer):
    asked = []
    monkeypatch.setattr(
        results, "generate_text", lambda *args, **options: asked.append((args, options)) or ["text"] * len(args[2])
    )
    said: list[str] = []
    run = dataclasses.replace(small_run, sample=SampleConfig(prompts=("[v1]", "b")), seed=2**32 - 1)
    results.show_samples("model", run, tokenizer, said.append)
    ((model, used, prompts), options) = asked[0]
    assert (model, used, tuple(prompts)) == ("model", tokenizer, ("[v1]", "b"))
    assert options["seed"] == 2**32 - 1 and options["max_new_tokens"] == 64
    assert said == ["--- '[v1]' continues:\ntext", "--- 'b' continues:\ntext", "---"]
