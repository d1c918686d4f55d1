"""Baichuan 2 7B from base to chat model: supervised fine-tuning with the released hyper-parameters.

python tools/prepare_chat.py DATA ... --tokenizer Baichuan2-7B-Base/tokenizer.model --out ROWS
python train.py configs/baichuan2_7b_chat.py --init-from Baichuan2-7B-Base --data.sources.0.path ROWS

As adapters (LoRA) beside the frozen base in bf16, with the ten times larger learning rate that is usual for them:
    --lora.rank 16 --lora.alpha 32 --optimizer.peak-learning-rate 2e-4 --optimizer.min-learning-rate 2e-4

From the authors' fine-tuning script: AdamW (0.9, 0.98, 1e-8) with a constant learning rate of 2e-5 and no
warm-up, weight decay 1e-4, gradients clipped at 1.0, bf16, 4 epochs, no max-z loss, the loss on the answers of all
turns. They took 16 samples a device, each padded or cut to 512 tokens: 65,536 positions a step on a machine with 8
devices. A step has as many here, 16 rows of 4,096; as samples are packed into them, nearly all positions are tokens,
and a pass over the data takes fewer steps.

Hardware (compile-time estimates of tools/aot_compile.py, docs/tpu.md; 1 row a chip):
    v5p-128 (v5p:4x4x4)  --data.global-batch-size 64
                         19.8 GiB of 95, MFU 0.74, 7,490 tokens/s a chip
Every axis of the mesh that cuts the batch must divide its rows; --mesh.context cuts the rows themselves.
Not yet run on hardware.
"""

import dataclasses

from bc2_jax.config import (
    BAICHUAN2_7B,
    TOKENIZER_OF_BASE,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    FineTuneConfig,
    OptimizerConfig,
    SourceConfig,
)


def config() -> FineTuneConfig:
    return FineTuneConfig(
        name="baichuan2_7b_chat",
        model=dataclasses.replace(BAICHUAN2_7B, z_loss_weight=0.0),
        data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer=TOKENIZER_OF_BASE, global_batch_size=16),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-5, min_learning_rate=2e-5, warmup_steps=0, b2=0.98, weight_decay=1e-4, clip_norm=1.0,
        ),
        checkpoint=CheckpointConfig(save_every=100),
        num_epochs=4,
        num_steps=1_000_000,  # no other limit than the epochs
        eval_every=100,
    )  # fmt: skip
