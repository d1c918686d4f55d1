"""Preferences and reinforcement learning on the demo's chat model: a reward model, DPO, and PPO on rewards that are
checked by rules.

python train.py configs/demo_rl.py            # at most 6 minutes on 2 cores, after the chat demo
python train.py configs/demo_rl.py --ppo.algorithm grpo --ppo.answers-per-prompt 8 --ppo.prompts-per-step 8

Takes the model of runs/demo_chat, and trains it if it is not there. First configs/demo_reward.py and
configs/demo_dpo.py run, if their runs are not there; then PPO begins with the chat model. Its rewards are the reward
model's score, how near the answer is to the right one, and whether it is in the language of the question. Prints the
share of held-out questions that are answered right before and after, and draws rewards and KL.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import HealthConfig, OptimizerConfig, PPOConfig, QuestionsConfig, RLConfig

FILE = Path(__file__)
REWARD = runpy.run_path(str(FILE.with_name("demo_reward.py")))
PREPARED = "prepared by configs/demo_rl.py"
RULES = "bc2_jax.align.demo_preferences"
REWARD_MODEL, DPO = "runs/demo_reward", "runs/demo_dpo"


def config() -> RLConfig:
    reward = REWARD["config"]()
    return RLConfig(
        name="demo_rl",
        model=reward.model,
        init_from=reward.init_from,
        compute=reward.compute,
        mesh=reward.mesh,
        ppo=PPOConfig(
            prompts=(PREPARED,), reward_model=REWARD_MODEL, reward_model_weight=0.1,
            reward_functions=(f"{RULES}:nearness", f"{RULES}:fits_language"),
            prompts_per_step=64, max_prompt_tokens=50, max_new_tokens=24, rollout_rows=64, minibatches=4,
            kl_start=0.1, kl_end=0.02, kl_steps=16, critic_warmup_steps=2, cut_penalty=1.0, critic_learning_rate=6e-4,
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-4, min_learning_rate=2e-4, warmup_steps=0, decay_steps=1, weight_decay=0.0,
            clip_norm=0.5,
        ),
        health=HealthConfig(spike_deviations=0.0),
        questions=QuestionsConfig(path=PREPARED, limit=100, max_new_tokens=24),
        checkpoint=dataclasses.replace(reward.checkpoint, save_every=8),
        num_steps=16,
        log_every=4,
        eval_every=16,
    )  # fmt: skip


def prepare(config: RLConfig) -> RLConfig:
    """Makes what is not there: the chat model, the reward model, DPO, prompts.

    What is named on the command line is used instead.
    """
    from bc2_jax.align.demo_runs import require_run

    if config.init_from == REWARD["BASE"]:
        require_run(config, "init_from", REWARD["BASE"], FILE.with_name("demo_chat.py"))
    if config.ppo.reward_model == REWARD_MODEL:
        require_run(config, "ppo.reward_model", REWARD_MODEL, FILE.with_name("demo_reward.py"))
        require_run(config, "ppo.reward_model", DPO, FILE.with_name("demo_dpo.py"))
    if config.ppo.prompts == (PREPARED,):
        prompts = (str(REWARD["preferences"]().prompts),)
        config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, prompts=prompts))
    if config.questions.path == PREPARED:
        questions = dataclasses.replace(config.questions, path=str(REWARD["preferences"]().questions))
        config = dataclasses.replace(config, questions=questions)
    return config
