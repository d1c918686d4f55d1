"""A ladder of six small models on the demo's text, which predicts its own largest one.

python train.py configs/scaling/tiny_ladder.py      # about 6 minutes on 2 cores; no accelerator

The five smaller rungs are trained first, each a run of its own in runs/tiny_ladder. A law is fitted to their losses on
held-out text, and says what the largest will reach before that is trained; then both are shown, as a table and in
runs/tiny_ladder/scaling. As in the paper's ladder all sizes see the same tokens, FFN is 3 x hidden, and each rung's
learning rate reaches its minimum at its own last step. What is changed on the command line is changed in every rung.
"""

import dataclasses
import runpy
from pathlib import Path
from typing import NamedTuple

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


def rung_config(rung: Rung) -> TrainConfig:
    return TrainConfig(
        name=f"tiny_ladder/h{rung.hidden}",
        model=ModelConfig(
            hidden_size=rung.hidden, intermediate_size=3 * rung.hidden, num_hidden_layers=rung.layers,
            num_attention_heads=rung.heads, position_embedding="alibi", vocab_size=4096, model_max_length=512,
            initializer_range=round(0.64 / rung.hidden**0.5, 4),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=DEMO["PREPARED"]),), tokenizer=DEMO["PREPARED"],
            sequence_length=256, global_batch_size=8,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", attention="reference", scan_layers=False),
        mesh=MeshConfig(num_cpu_devices=1),
        optimizer=OptimizerConfig(
            peak_learning_rate=rung.learning_rate, min_learning_rate=rung.learning_rate / 10, warmup_steps=30,
            decay_steps=STEPS,
        ),
        checkpoint=CheckpointConfig(save_every=STEPS, keep_last=1),
        num_steps=STEPS,
        log_every=100,
        eval_every=STEPS,
    )  # fmt: skip


def config() -> TrainConfig:
    return rung_config(RUNGS[-1])


def prepare(config: TrainConfig) -> TrainConfig:
    return DEMO["prepare"](config)
