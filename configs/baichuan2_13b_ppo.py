"""Baichuan 2 13B chat by reinforcement learning from a reward model: PPO with the paper's settings (section 3.3).

python train.py configs/baichuan2_13b_ppo.py --init-from CHAT --ppo.reward-model RM --ppo.prompts PROMPTS

CHAT is the chat model (actor and reference), RM a run of configs/baichuan2_13b_reward.py (reward, and the critic's
start), PROMPTS a file of prompts. docs/rl.md says what is computed, what to watch and how to resume.

Without a critic, groups of answers are compared:
    --ppo.algorithm grpo --ppo.prompts-per-step 32 --ppo.answers-per-prompt 8
With rewards that a function computes, FILE.py:NAME, beside or instead of the reward model:
    --ppo.reward-functions FILE.py:NAME
As adapters (LoRA) beside the frozen models in bf16, with the ten times larger learning rate that is usual for them:
    --lora.rank 16 --lora.alpha 32 --optimizer.peak-learning-rate 5e-5 --optimizer.min-learning-rate 5e-5

From the paper: actor and critic with a constant learning rate of 5e-6, gradients clipped at 0.5, clip 0.1, the critic
alone in the first 20 iterations, 350 iterations, KL coefficient 0.2 -> 0.005. Not in the paper, and chosen here: the
way between the two coefficients (geometric), prompts and answers of an iteration (256 of up to 1,024 tokens), one epoch
of 4 updates, gamma 1 and lambda 0.95, value clip 0.2, Adam's settings (those of the authors' fine-tuning).

Hardware and time: python tools/aot_compile.py configs/baichuan2_13b_ppo.py --topology v5p:4x4x4
Not yet run on hardware.
"""

import dataclasses

from bc2_jax.config import BAICHUAN2_13B, CheckpointConfig, ComputeConfig, OptimizerConfig, PPOConfig, RLConfig


def config() -> RLConfig:
    return RLConfig(
        name="baichuan2_13b_ppo",
        model=dataclasses.replace(BAICHUAN2_13B, z_loss_weight=0.0),
        ppo=PPOConfig(
            prompts_per_step=256, answers_per_prompt=1, max_prompt_tokens=1024, max_new_tokens=1024, rollout_rows=256,
            rollout_gathers_once=True, epochs=1, minibatches=4, clip=0.1, kl_schedule="geometric", kl_start=0.2,
            kl_end=0.005, kl_steps=350, critic_warmup_steps=20,
        ),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        optimizer=OptimizerConfig(
            peak_learning_rate=5e-6, min_learning_rate=5e-6, warmup_steps=0, b2=0.98, weight_decay=0.0, clip_norm=0.5,
        ),
        checkpoint=CheckpointConfig(save_every=10),
        num_steps=350,
        log_every=1,
        eval_every=50,
    )  # fmt: skip
