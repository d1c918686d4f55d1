"""A chat model, a reward model and prompts on disk, small enough for whole runs of reinforcement learning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from bc2_jax.checkpoint import save_context
from bc2_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RLConfig,
)
from bc2_jax.convert.pretrained import save_params
from bc2_jax.model.baichuan import init_params
from bc2_jax.model.reward import reward_params_from
from bc2_jax.tokenizer import EOS_ID, Tokenizer

PROMPTS = ["the cat", "the dog sat", "on the mat", "the log and the dog", "and"]


def model_of(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
        vocab_size=tokenizer.vocab_size, z_loss_weight=0.0, model_max_length=64, initializer_range=0.2,
    )  # fmt: skip


def write_models(folder: Path, tokenizer: Tokenizer, mesh: Mesh) -> RLConfig:
    """FOLDER/chat, FOLDER/reward and FOLDER/prompts.jsonl, and a run of two iterations with them.

    About one token in six that the chat model samples is an eos, so that answers end at different lengths.
    """
    model = model_of(tokenizer)
    params = jax.tree.map(np.array, init_params(model, 1, mesh))
    direction = np.random.default_rng(0).normal(size=model.hidden_size).astype(np.float32)
    params["embed_tokens"]["weight"] += 2.0 * direction
    params["lm_head"]["weight"][EOS_ID] = direction
    params = jax.tree.map(jnp.asarray, params)
    save_params(params, model, folder / "chat", tokenizer.path)
    reward = reward_params_from(init_params(model, 2, mesh), model, 3, mesh)
    run = folder / "reward" / "checkpoints"
    run.mkdir(parents=True)
    metadata = {"config": {"model": dataclasses.asdict(model), "reward": {"centring": 0.0}}}
    with save_context():
        ocp.save_checkpointables((run / "1").absolute(), {"params": reward}, custom_metadata=metadata)
    records = [json.dumps({"prompt": text, "target": len(text)}) + "\n" for text in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(records))
    return RLConfig(
        name="test", model=model, init_from=str(folder / "chat"), num_steps=3,
        ppo=PPOConfig(
            prompts=(str(folder / "prompts.jsonl"),), reward_model=str(folder / "reward"),
            reward_functions=(f"{__file__}:reward",), prompts_per_step=4, answers_per_prompt=4, max_prompt_tokens=20,
            max_new_tokens=12, rollout_rows=8, epochs=2, minibatches=2, critic_warmup_steps=1, patience=0,
            keep_rollouts_every=1, kl_steps=3,
        ),
        compute=ComputeConfig(dtype="float32", attention="reference", loss_chunk=32, remat="none"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, min_learning_rate=1e-3, warmup_steps=0, weight_decay=0.0),
        checkpoint=CheckpointConfig(save_every=1, keep_last=9), eval_every=100, log_every=1, verify_resume_steps=1,
    )  # fmt: skip


def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]:
    """Fractional: the share of letters that are a t."""
    assert all(len(prompt) == row["target"] for prompt, row in zip(prompts, rows, strict=True))
    return [answer.count("t") / max(len(answer), 1) for answer in answers]
