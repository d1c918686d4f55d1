"""Baichuan 2 13B on sequences of 32,768 tokens: the long-context stage after pre-training at 4,096.

python train.py configs/baichuan2_13b_32k.py --init-from CHECKPOINT --data.sources.0.path ROWS
    --data.tokenizer tokenizer.model

The paper does not train at this length; ALiBi needs no change for it. Rows are packed with
`tools/tokenize_corpus.py --sequence-length 32768`. Batch, learning rate and number of steps are ours.
Compile-time estimate (docs/tpu.md) on v5p-256 (v5p:4x4x8, 128 chips, four to a sequence): 59.7 GiB a chip, MFU 0.79,
3,030 tokens/s a chip, with --mesh.data 4 --mesh.fsdp-inner 1 --compute.loss-chunk 8192
--compute.remat q,k,v,attention,o,gate,up,down_proj (0.78 without these). Not yet run on hardware.
"""

import dataclasses

from bc2_jax.config import (
    BAICHUAN2_13B,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        name="baichuan2_13b_32k",
        model=dataclasses.replace(BAICHUAN2_13B, model_max_length=32_768),
        data=DataConfig(
            sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=32_768,
            global_batch_size=32,
        ),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        mesh=MeshConfig(context=4, fsdp_inner=4),
        optimizer=OptimizerConfig(peak_learning_rate=2e-5, min_learning_rate=2e-6, warmup_steps=100, decay_steps=5_000),
        num_steps=5_000,
    )  # fmt: skip
