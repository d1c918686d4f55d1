"""A reward model for the demo, from its chat model and pairs of answers of which one is known to be better.

python train.py configs/demo_reward.py        # about 1 minute on 2 cores, after the chat demo

Takes the model of runs/demo_chat, and trains it if it is not there. configs/demo_rl.py runs this first.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import DataConfig, MeshConfig, OptimizerConfig, RewardConfig, SourceConfig

FILE = Path(__file__)
CHAT = runpy.run_path(str(FILE.with_name("demo_chat.py")))
BASE = "runs/demo_chat"
PREPARED = "prepared by configs/demo_reward.py"
TOKENIZER = f"{BASE}/tokenizer.model"


def config() -> RewardConfig:
    chat = CHAT["config"]()
    return RewardConfig(
        name="demo_reward",
        model=chat.model,
        init_from=BASE,
        # prepare() makes the pairs and names their real place.
        data=DataConfig(
            sources=(SourceConfig(path=PREPARED),), tokenizer=TOKENIZER, sequence_length=256, global_batch_size=8,
        ),
        compute=chat.compute,
        mesh=MeshConfig(fsdp=2, num_cpu_devices=2),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-4, min_learning_rate=3e-5, warmup_steps=5, decay_steps=40, b2=0.98, weight_decay=1e-4,
            clip_norm=1.0,
        ),
        checkpoint=dataclasses.replace(chat.checkpoint, save_every=40),
        num_steps=40,
        log_every=20,
        eval_every=20,
    )  # fmt: skip


def prepare(config: RewardConfig) -> RewardConfig:
    """Trains the chat demo if its model is not there; makes the pairs, once. Pairs named on the command line are used
    instead."""
    from bc2_jax.align.demo_runs import require_run

    if config.init_from == BASE:
        require_run(config, "init_from", BASE, FILE.with_name("demo_chat.py"))
    if config.data.sources != (SourceConfig(path=PREPARED),):
        return config
    sources = (SourceConfig(path=str(preferences().pairs)),)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def preferences():
    """`align.demo_preferences.DemoPreferences`: pairs and prompts, made at the first call."""
    from bc2_jax.align.demo import prepare_chat_demo
    from bc2_jax.align.demo_preferences import prepare_preferences

    return prepare_preferences(prepare_chat_demo(Path(BASE), sequence_length=256))
