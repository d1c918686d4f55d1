"""A reward model for Baichuan 2 13B: from a chat model and pairs of answers of which one is preferred.

python train.py configs/baichuan2_13b_reward.py --init-from CHAT --data.sources.0.path PAIRS
python tools/reward_report.py runs/baichuan2_13b_reward PAIRS

PAIRS are files of preference pairs, or their rows, packed beforehand by tools/prepare_chat.py --pairs. The head of the
chat model is left out and a new score, one weight for each of the model's dimensions, takes its place; the rest is
trained on. As adapters (LoRA) and a score beside the frozen chat model in bf16:
    --lora.rank 16 --lora.alpha 32 --optimizer.peak-learning-rate 1e-4 --optimizer.min-learning-rate 1e-5

The paper trains its reward model on prompts of 6 / 30 / 200+ classes (tools/reward_report.py --plan N draws up such a
collection) and gives no hyper-parameters for it. Here they are those of the fine-tuning script, but for one pass over
the pairs, as more over-fit (arXiv 2203.02155), and a learning rate that goes from 1e-5 down to a tenth by a cosine. The
pairs' margins, where they have any, are asked for; squared sums of rewards, with the weight 0.01, keep them around 0.

Hardware: memory and time are those of configs/baichuan2_13b_chat.py without the head: a prompt is computed once for
both answers, so that a row of 4,096 tokens holds as many pairs as fit with their prompts counted once. Every axis of
the mesh that cuts the batch must divide its rows. Not yet run on hardware.

At the end WORKDIR has rewards.png and rewards.json, mean and spread of the held-out rewards, which PPO uses to shift
rewards to a mean of 0.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import RewardConfig

CHAT_13B = runpy.run_path(str(Path(__file__).with_name("baichuan2_13b_chat.py")))


def config() -> RewardConfig:
    chat = CHAT_13B["config"]()
    rates = {"peak_learning_rate": 1e-5, "min_learning_rate": 1e-6, "warmup_steps": 20}
    return RewardConfig(
        name="baichuan2_13b_reward",
        model=chat.model,
        data=chat.data,
        compute=chat.compute,
        optimizer=dataclasses.replace(chat.optimizer, **rates),
        checkpoint=chat.checkpoint,
        num_epochs=1,
        num_steps=chat.num_steps,  # no other limit than the epochs
        eval_every=chat.eval_every,
    )
