"""A run small enough to be done often: 8 steps on a mesh of 2 x 2 x 2."""

from __future__ import annotations

import pytest

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
from tests.packed_rows import pack_texts


@pytest.fixture(scope="session")
def small_run(modules, tokenizer, tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("corpus")
    documents = [part for module in modules for part in module.split("\n\n") if part]
    # Two batches are held out: every run evaluates all of them.
    pack_texts(documents, tokenizer, folder / "rows", 32, validation_fraction=0.002)
    return TrainConfig(
        name="test",
        model=ModelConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            position_embedding="alibi", vocab_size=640,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "rows")),), tokenizer=str(tokenizer.path), sequence_length=32,
            global_batch_size=8, accumulation_steps=2,
        ),
        compute=ComputeConfig(attention_block=16, loss_chunk=32),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2, decay_steps=20),
        checkpoint=CheckpointConfig(save_every=4, keep_last=9),
        num_steps=8, eval_every=8, log_every=4,
    )  # fmt: skip
