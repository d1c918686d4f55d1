"""A ladder of six small models on the demo's text, which predicts its own largest one.

python train.py configs/scaling/tiny_ladder.py      # about 13 CPU minutes; no accelerator

The five smaller rungs are trained first, each a run of its own in runs/tiny_ladder; finished ones are not
trained again. A law is fitted to their losses on held-out text and says what the largest will reach before that is
trained; then both are shown, as a table and as a picture in runs/tiny_ladder/scaling. As in the paper's ladder all
sizes see the same tokens, FFN is 3 x hidden, and each rung's learning rate reaches its minimum at its own last step.

A field that is changed on the command line is changed in every rung, but for the sizes and learning rates that are the
rung's own. With another --name it is a single run.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)

FILE = Path(__file__)
DEMO = runpy.run_path(str(FILE.parents[1] / "demo.py"))
LADDER = "runs/tiny_ladder"
# About the scatter of such small runs. At the usual 0.001 Huber's loss would pass through three of the five.
DELTA = 0.01
STEPS = 300


class Rung(NamedTuple):
    hidden: int
    layers: int
    heads: int
    learning_rate: float


RUNGS = (
    Rung(32, 2, 2, 1.2e-2),
    Rung(48, 2, 3, 9.4e-3),
    Rung(64, 3, 4, 7.9e-3),
    Rung(80, 3, 5, 6.9e-3),
    Rung(112, 3, 7, 5.7e-3),
    Rung(160, 4, 10, 4.6e-3),
)


def config() -> TrainConfig:
    common = TrainConfig(
        name="",
        model=ModelConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
            position_embedding="alibi", vocab_size=4096, model_max_length=512,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=DEMO["PREPARED"]),), tokenizer=DEMO["PREPARED"],
            sequence_length=256, global_batch_size=8,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", attention="reference", scan_layers=False),
        mesh=MeshConfig(num_cpu_devices=1),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=30, decay_steps=STEPS),
        checkpoint=CheckpointConfig(save_every=STEPS, keep_last=1),
        num_steps=STEPS,
        log_every=100,
        eval_every=STEPS,
    )  # fmt: skip
    return as_rung(common, RUNGS[-1])


def as_rung(config: TrainConfig, rung: Rung) -> TrainConfig:
    """`config` with what is the rung's own."""
    return dataclasses.replace(
        config, name=f"tiny_ladder/h{rung.hidden}",
        model=dataclasses.replace(
            config.model, hidden_size=rung.hidden, intermediate_size=3 * rung.hidden, num_hidden_layers=rung.layers,
            num_attention_heads=rung.heads, initializer_range=round(0.64 / rung.hidden**0.5, 4),
        ),
        optimizer=dataclasses.replace(
            config.optimizer, peak_learning_rate=rung.learning_rate, min_learning_rate=rung.learning_rate / 10
        ),
    )  # fmt: skip


def prepare(config: TrainConfig) -> TrainConfig:
    """The demo's text; for the largest rung, the others first, and what they predict for it."""
    prepared = DEMO["prepare"](config)
    if not is_ladder(config):
        return prepared
    from bc2_jax.align.demo_runs import is_finished, require_run
    from bc2_jax.evaluate.scaling.analysis import analyse

    for rung, folder in smaller(config):
        mine = dataclasses.replace(as_rung(config, rung), workdir=None, resume="never")
        if is_finished(folder):
            require_same(folder, dataclasses.replace(mine, data=prepared.data))
        require_run(config, "name", str(folder), FILE, arguments(mine, globals()["config"](), ""))
    analysis = analyse(*ladder(config), law="compute", delta=DELTA)
    (predicted,) = analysis.predictions
    assert predicted.intervals is not None
    low, high = predicted.intervals[-1]
    print(
        f"{config.name} will have a loss of {predicted.loss:.5f}, 95 % {low:.5f} to {high:.5f}: predicted from "
        f"{len(RUNGS) - 1} smaller rungs before it is trained.", flush=True,
    )  # fmt: skip
    return prepared


def finish(config: TrainConfig, workdir: Path) -> None:
    """The prediction beside what came out, as a table and a picture."""
    if not is_ladder(config):
        return
    from bc2_jax.evaluate.scaling.analysis import analyse, print_analysis, save_analysis
    from bc2_jax.terminal import make_console

    points, targets = ladder(config, workdir)
    console, analysis = make_console(), analyse(points, targets, law="compute", delta=DELTA)
    print_analysis(analysis, console)
    guess, (reached,) = points.points[-1].loss, targets
    console.print(f"Without a law, the loss of the rung before would be {guess / reached.loss - 1:+.2%} off.")
    out = smaller(config)[0][1].parent / "scaling"
    save_analysis(analysis, out)
    console.print(f"picture      {out / 'scaling.png'}")


def is_ladder(config: TrainConfig) -> bool:
    return config.name == f"tiny_ladder/h{RUNGS[-1].hidden}"


def smaller(config: TrainConfig) -> list[tuple[Rung, Path]]:
    """The smaller rungs and where they are."""
    root = Path(LADDER) if config.workdir is None else Path(config.workdir).expanduser() / "ladder"
    return [(rung, root / f"h{rung.hidden}") for rung in RUNGS[:-1]]


def ladder(config: TrainConfig, largest: Path | None = None) -> tuple[Any, list[Any]]:
    """The points of the smaller rungs, and the largest as what is to be predicted."""
    from bc2_jax.evaluate.scaling import collection, flops

    folders = [folder for _, folder in smaller(config)]
    if largest is None:
        length, tokens = config.data.sequence_length, config.num_steps * config.tokens_per_step
        compute = flops.training_compute(config.model, tokens, length).total
        N = flops.matmul_parameters(config.model)
        return collection.collect(folders), [collection.Point(config.name, N, tokens, compute, float("nan"))]
    found = collection.collect([*folders, largest])
    if found.points[-1].name != str(largest):
        raise ValueError(f"{largest} has no final loss, or is not the largest of its ladder.")
    return dataclasses.replace(found, points=found.points[:-1]), [found.points[-1]]


def require_same(folder: Path, expected: TrainConfig) -> None:
    """Raises ValueError if the run in `folder` is not this rung of this ladder."""
    from bc2_jax.train.kinds import read_config

    recorded = read_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for field in ("model", "data", "compute", "optimizer", "num_steps", "seed", "eval_batches"):
        if getattr(recorded, field) != getattr(expected, field):
            raise ValueError(
                f"{folder} holds a run with another {field} than this ladder's: give --workdir NEW, or remove it."
            )


def arguments(config: Any, default: Any, prefix: str) -> list[str]:
    """What to type so that `default` becomes `config`. Raises ValueError for what only a file can say."""
    found = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += arguments(value, usual, f"{name}.")
        elif value != usual:
            if isinstance(value, bool):
                head, _, last = name.rpartition(".")
                found.append("--" + ".".join(filter(None, (head, last if value else f"no-{last}"))))
            elif isinstance(value, str | int | float):
                found += [f"--{name}", str(value)]
            else:
                raise ValueError(f"{name} can't be handed to the smaller rungs: change it in a copy of {FILE.name}.")
    return found
