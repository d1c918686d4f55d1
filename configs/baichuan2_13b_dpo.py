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
import runpy
from pathlib import Path

from bc2_jax.config import DPOConfig, DPOOptions, SourceConfig

CHAT_13B = runpy.run_path(str(Path(__file__).with_name("baichuan2_13b_chat.py")))


def config() -> DPOConfig:
    chat = CHAT_13B["config"]()
    rates = {"peak_learning_rate": 5e-7, "min_learning_rate": 5e-7, "warmup_steps": 20}
    return DPOConfig(
        name="baichuan2_13b_dpo",
        model=chat.model,
        data=dataclasses.replace(chat.data, sources=(SourceConfig(path="pairs"),)),
        compute=chat.compute,
        optimizer=dataclasses.replace(chat.optimizer, b2=0.95, weight_decay=0.0, **rates),
        dpo=DPOOptions(loss="sigmoid", beta=0.1),
        checkpoint=chat.checkpoint,
        num_epochs=1,
        num_steps=chat.num_steps,  # no other limit than the epochs
        eval_every=50,
    )
