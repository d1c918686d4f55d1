"""The commands of `bc2 demo --all`: their options exist, and what they read is made before."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tyro

from bc2_jax.cli.programs import PROGRAMS
from bc2_jax.config.file import read_config_file
from bc2_jax.demo.report import fold_command
from bc2_jax.demo.stage import Stage, typed_commands
from bc2_jax.demo.stages import SIZES, STEPS, make_stages
from bc2_jax.evaluate.scaling.fit import FEWEST_VALUES
from bc2_jax.train.kinds import KINDS

STAGES = make_stages()
COMMANDS = [(stage.name, command) for stage in STAGES for command in stage.commands]


def parse(command: tuple[str, ...]) -> Any:
    """What a program makes of its arguments. Ends the test by SystemExit if it refuses them."""
    program, name, *args = command
    if program == "python":
        assert name == "-m" and importlib.util.find_spec(args[0]) is not None
        return None
    module = importlib.import_module(f"bc2_jax.cli.{PROGRAMS[name].module}")
    if name == "train":
        file = read_config_file(args[0], *KINDS)
        return tyro.cli(type(file.config), default=file.config, args=args[1:])
    parse_arguments = getattr(module, "parse_arguments", None)
    return parse_arguments(args) if parse_arguments else module.make_parser().parse_args(args)


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(COMMANDS)])
def test_every_command_is_understood(name: str, command: tuple[str, ...]):
    parse(command)


def test_the_runs_fit_each_other():
    configs = {c.workdir: c for _, command in COMMANDS if command[1] == "train" for c in [parse(command)]}
    assert set(configs) == {*SIZES, "chat", "reward", "dpo", "rl"}
    base = configs["base"]
    for name, config in configs.items():
        assert config.resume == "auto" and config.num_steps > config.checkpoint.save_every
        if name in STEPS:
            assert config.num_steps == STEPS[name]
        if name not in SIZES:
            assert config.init_from == ("base" if name == "chat" else "chat")
            for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
                assert getattr(config.model, field) == getattr(base.model, field)
    # The law compares final losses on the same tokens.
    rungs = [configs[name] for name in SIZES]
    assert len({(rung.num_steps, rung.optimizer.decay_steps, rung.data.global_batch_size) for rung in rungs}) == 1
    sizes = [rung.model.num_parameters() for rung in rungs]
    assert sizes == sorted(sizes)
    assert len(rungs) - 1 >= FEWEST_VALUES  # as many as the law without its largest point needs


def test_what_a_command_reads_is_made_before_it():
    made: dict[str, Stage] = {}
    for stage in STAGES:
        inputs = {word.partition("/")[0] for command in stage.commands for word in command[1:]}
        for output, by in made.items():
            if output in inputs and by.name not in stage.needs:
                assert by.name in needed(stage), f"{stage.name} reads {output} of {by.name}"
        made |= {output: stage for output in stage.outputs}
    assert len(made) == sum(len(stage.outputs) for stage in STAGES)  # no two stages make the same


def needed(stage: Stage) -> set[str]:
    """All stages before it that it stands on."""
    by_name = {one.name: one for one in STAGES}
    return {name for need in stage.needs for name in (need, *needed(by_name[need]))}


def test_the_docs_show_these_commands():
    """Else docs/demo.md must be written again: bc2 demo --all --docs docs/demo.md."""
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    for stage in STAGES:
        for command in typed_commands(stage):
            assert fold_command(command) in page


def test_names_are_different_and_needs_come_before():
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    for index, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(names[:index])
        assert all(not Path(output).is_absolute() and ".." not in Path(output).parts for output in stage.outputs)
    assert sum(stage.seconds for stage in STAGES) < 15 * 60
