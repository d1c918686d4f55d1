"""The paper's ladder of small models (section 2.6) as configs, and the models to predict."""

from __future__ import annotations

import math
from pathlib import Path

from bc2_jax.config import (
    BAICHUAN2_7B,
    BAICHUAN2_13B,
    ComputeConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from bc2_jax.config.file import read_config_file
from bc2_jax.evaluate.scaling.collection import Point
from bc2_jax.evaluate.scaling.flops import matmul_parameters, training_compute
from bc2_jax.kernels.flash import HEAD_SIZES
from bc2_jax.train.kinds import KINDS

PAPER_TOKENS = 1e12  # per rung, in the paper
LENGTH = 4096
_BATCH = 1024
_SHAPES = {  # hidden size: layers, heads
    384: (6, 6), 704: (8, 8), 832: (12, 8), 1216: (16, 8), 1792: (20, 14), 2240: (24, 14), 2880: (28, 20),
}  # fmt: skip
RUNGS = tuple(_SHAPES)  # hidden sizes
TARGETS = {"7b": BAICHUAN2_7B, "13b": BAICHUAN2_13B}


def paper_rung(hidden: int, tokens: float = PAPER_TOKENS) -> TrainConfig:
    """The rung with a hidden size of RUNGS; its schedule ends at its last step.

    Layers, heads, feed-forward size (3 x hidden) and tokens are the paper's. Positions, batch and learning rate (7B's x
    sqrt(4096 / hidden)) are ours. The TPU attention kernel takes head sizes 64 and 128 only; other rungs run without
    it.
    """
    layers, heads = _SHAPES[hidden]
    steps = round(tokens / (_BATCH * LENGTH))
    peak = round(2e-4 * math.sqrt(BAICHUAN2_7B.hidden_size / hidden), 6)
    return TrainConfig(
        name=f"ladder/h{hidden}",
        model=ModelConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            position_embedding="rope",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=LENGTH,
            global_batch_size=_BATCH,
        ),
        compute=ComputeConfig(
            attention="flash" if hidden // heads in HEAD_SIZES else "chunked", remat="save_dots"
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=peak, min_learning_rate=peak / 10, warmup_steps=min(2000, steps // 10),
            decay_steps=steps,
        ),
        num_steps=steps,
    )  # fmt: skip


def make_target(name: str, tokens: float) -> Point:
    """A model to predict: 7b, 13b, or that of a config file, trained on `tokens`.

    Raises ValueError for another name, and as `read_config_file`.
    """
    name = name.strip()
    if (model := TARGETS.get(name.lower())) is not None:
        length = LENGTH
    elif Path(name).suffix == ".py":
        config = read_config_file(name, *KINDS).config
        model, length = config.model, getattr(getattr(config, "data", None), "sequence_length", LENGTH)
    else:
        raise ValueError(f"--predict {name} is not valid: write 7b, 13b or the path of a config file.")
    compute = training_compute(model, tokens, length).total
    return Point(name, matmul_parameters(model), tokens, compute, math.nan)
