"""Baichuan 2 13B chat: preference tuning (DPO) on pairs of answers, as the paper's alignment begins for safety.

python train.py configs/baichuan2_13b_dpo.py --init-from Baichuan2-13B-Chat --data.sources.0.path PAIRS

PAIRS is a file or folder of JSON records with prompt, chosen and rejected (docs/preferences.md), or rows that
tools/prepare_chat.py --pairs has made of them. The chat model is the reference too: its log-probabilities of all
answers are computed once, before the first step, and kept. Other losses:
    --dpo.loss cdpo|ipo|ipo_mean|hinge|robust|sigmoid_norm  --dpo.beta 0.1  --dpo.label-smoothing 0.1
    --dpo.sft-weight 0.1 adds the cross entropy of the chosen answers, which keeps them likely

As adapters (LoRA) beside the frozen chat model in bf16, with a ten times larger learning rate:
    --lora.rank 16 --lora.alpha 32 --optimizer.peak-learning-rate 5e-6 --optimizer.min-learning-rate 5e-6

The paper gives no numbers for DPO. These are usual ones: beta 0.1, a constant learning rate of 5e-7 after 20 steps of
warm-up, no weight decay, gradients clipped at 1.0, one epoch. A step has 16 rows of 4,096 tokens; a pair takes its
prompt once and both answers, so with 500 tokens a pair that is 130 pairs. Every pair of a step has the same weight.

Expected: a loss of log 2 = 0.693 and rewards of 0 at step 0; then the margin between the rewards grows, and accuracy on
held-out pairs rises from 50 %.
Every axis of the mesh that cuts the batch must divide its rows; --mesh.context cuts the rows themselves.
Not yet run on hardware.
"""

import dataclasses

from bc2_jax.config import (
    BAICHUAN2_13B,
    TOKENIZER_OF_BASE,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    DPOConfig,
    DPOOptions,
    OptimizerConfig,
    SourceConfig,
)


def config() -> DPOConfig:
    return DPOConfig(
        name="baichuan2_13b_dpo",
        model=dataclasses.replace(BAICHUAN2_13B, z_loss_weight=0.0),
        data=DataConfig(sources=(SourceConfig(path="pairs"),), tokenizer=TOKENIZER_OF_BASE, global_batch_size=16),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        optimizer=OptimizerConfig(
            peak_learning_rate=5e-7, min_learning_rate=5e-7, warmup_steps=20, b2=0.95, weight_decay=0.0, clip_norm=1.0,
        ),
        dpo=DPOOptions(loss="sigmoid", beta=0.1),
        checkpoint=CheckpointConfig(save_every=100),
        num_epochs=1,
        num_steps=1_000_000,  # no other limit than the epochs
        eval_every=50,
    )  # fmt: skip
