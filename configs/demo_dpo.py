"""Direct preference optimization of the demo's chat model, on pairs of answers of which one is known to be better.

python train.py configs/demo_dpo.py           # about 1 minute on 2 cores, after the chat demo

Takes the model of runs/demo_chat, and trains it if it is not there. configs/demo_rl.py runs this first. Prints the
share of held-out questions that are answered right before and after.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import DPOConfig, DPOOptions, OptimizerConfig, QuestionsConfig

PREPARED = "prepared by configs/demo_dpo.py"
REWARD = runpy.run_path(str(Path(__file__).with_name("demo_reward.py")))


def config() -> DPOConfig:
    reward = REWARD["config"]()
    return DPOConfig(
        name="demo_dpo",
        model=reward.model,
        init_from=reward.init_from,
        data=reward.data,
        compute=reward.compute,
        mesh=reward.mesh,
        dpo=DPOOptions(beta=0.1, sft_weight=0.2),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-4, min_learning_rate=1e-5, warmup_steps=5, decay_steps=30, b2=0.98, weight_decay=0.0,
            clip_norm=1.0,
        ),
        questions=QuestionsConfig(path=PREPARED, limit=100, max_new_tokens=24),
        checkpoint=dataclasses.replace(reward.checkpoint, save_every=30),
        num_steps=30,
        log_every=10,
        eval_every=30,
    )  # fmt: skip


def prepare(config: DPOConfig) -> DPOConfig:
    """As that of configs/demo_reward.py; asks the held-out questions of the chat demo."""
    config = REWARD["prepare"](config)
    if config.questions.path != PREPARED:
        return config
    path = str(REWARD["preferences"]().questions)
    return dataclasses.replace(config, questions=dataclasses.replace(config.questions, path=path))
