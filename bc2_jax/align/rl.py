"""Reinforcement learning of a chat model (paper section 3.3): PPO with a critic, or GRPO.

A step of the run is an iteration: a rollout, its scores, and some updates in one program.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.align import actor_critic, grpo, ppo
from bc2_jax.align.experience import Rollouts
from bc2_jax.align.experience_checks import check_ratio
from bc2_jax.align.prompts import load_prompts
from bc2_jax.align.questions import make_examine, read_questions
from bc2_jax.align.reward_functions import load_reward_function
from bc2_jax.align.rl_results import check_exports, make_ending, print_plan
from bc2_jax.align.shaping import ADVANTAGE, COEFFICIENT, OLD, REFERENCE, RETURN, UPDATE, VALUE, fields_of
from bc2_jax.align.tuning import checksum, label_log_probs, tuned_flops_per_sequence
from bc2_jax.aot.inference import inference_compute
from bc2_jax.aot.rollout import RolloutParts
from bc2_jax.config import TOKENIZER_OF_BASE, ModelConfig, RLConfig
from bc2_jax.convert.checkpoints import ACTOR, CRITIC
from bc2_jax.convert.pretrained import find_tokenizer
from bc2_jax.convert.reward import find_reward_model
from bc2_jax.data.batch import FIELDS, IGNORED, AbstractBatch, Batch
from bc2_jax.files import file_sha256, fingerprint
from bc2_jax.infer import engine
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import place_shapes, spec, use_rules
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import checks
from bc2_jax.train.job import Job, Objective, Parts, StepParts, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.optimizer import Optimizer, combine_optimizers, make_optimizer
from bc2_jax.train.pretrain import keep_tokenizer
from bc2_jax.train.results import end_run
from bc2_jax.train.resume import check_changes, list_changes, print_changes
from bc2_jax.train.start import tuned_options
from bc2_jax.validation import require

CHECKSUMS, PROMPTS = "checksums", "prompts_sha256"
"""In the metadata of a checkpoint: checksums of the models that are not trained, in hex; hash of the prompts'
tokens."""
_log = logging.getLogger(__name__)


def train(config: RLConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Runs PPO or GRPO; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: RLConfig) -> RLConfig:
    """Fills in the tokenizer of the chat model, if asked for.

    Raises ValueError, naming the field, without a chat model, prompts or rewards; FileNotFoundError without a
    tokenizer."""
    rl = config.ppo
    require(
        config.init_from is not None, "init_from", config.init_from,
        "reinforcement learning needs the chat model: a PyTorch folder, a checkpoint or a run",
    )  # fmt: skip
    require(len(rl.prompts) > 0, "ppo.prompts", rl.prompts, "at least one file or folder of prompts is needed")
    require(
        rl.reward_model is not None or len(rl.reward_functions) > 0, "ppo.reward_model", rl.reward_model,
        "a reward model or ppo.reward_functions are needed",
    )  # fmt: skip
    if config.tokenizer == TOKENIZER_OF_BASE:
        config = dataclasses.replace(config, tokenizer=str(find_tokenizer(str(config.init_from))))
    return config


def make_step(config: RLConfig, mesh: Mesh) -> StepParts:
    """The updates of an iteration, of all parameters or of adapters; of a reward model only the config is read."""
    critic = actor_critic.critic_model(config)
    optimizer = make_optimizers(config)
    return StepParts(
        objective=make_objective(config, critic),
        optimizer=optimizer,
        state=abstract_state(actor_critic.abstract_trained(config, critic, mesh), optimizer),
        batch=abstract_batch(config, mesh),
        flops_per_step=flops_per_step(config, critic),
        updates=config.ppo.updates,
        frozen=actor_critic.frozen_of(config, actor_critic.abstract_held(config, critic, mesh)),
        load_frozen=lambda: actor_critic.frozen_of(config, actor_critic.load_held(config, mesh)),
    )


def abstract_batch(config: RLConfig, mesh: Mesh) -> AbstractBatch:
    """Shapes and shardings of the batch of a step: [updates * accumulation steps, B, T]."""
    rl = config.ppo
    steps = rl.updates * rl.accumulation_steps

    def place(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        axes = (None,) if len(shape) == 1 else (None, "batch", "sequence")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    rows = steps, rl.micro_rows, rl.row_tokens
    batch = {name: place(rows, jnp.int32) for name in FIELDS}
    batch |= {name: place(rows, jnp.float32) for name in fields_of(rl)}
    return batch | {UPDATE: place((steps,), jnp.int32), COEFFICIENT: place((steps,), jnp.float32)}


def make_optimizers(config: RLConfig) -> Optimizer:
    """Optimizers of actor and critic, clipped separately; the actor waits for the critic's warm-up."""
    rl = config.ppo
    parts = {ACTOR: make_optimizer(config.optimizer)}
    if not rl.has_critic:
        return combine_optimizers(parts)
    parts[CRITIC] = make_optimizer(config.critic_optimizer)
    return combine_optimizers(parts, wait={ACTOR: rl.critic_warmup_steps * rl.updates})


def flops_per_step(config: RLConfig, critic: ModelConfig) -> int:
    """Model FLOPs of the updates of an iteration, without decoding and the forward passes for experience."""
    rl, models = config.ppo, [config.model, critic] if config.ppo.has_critic else [config.model]
    each = (tuned_flops_per_sequence(config.lora, model, rl.row_tokens) for model in models)
    return rl.epochs * rl.answers * sum(each)


def make_rollout(config: RLConfig, mesh: Mesh) -> RolloutParts:
    """Shapes of the rollout, for ahead-of-time compilation (`aot/rollout.py`), and the models held besides the state
    and the frozen parameters.

    A run without reward functions is taken to have a reward model, of the actor's architecture unless
    `ppo.reward_model` names one. With adapters, reference and reward model are the frozen parameters themselves.
    """
    rl, lora, critic = config.ppo, config.lora.rank > 0, actor_critic.critic_model(config)
    models = actor_critic.make_models(dataclasses.replace(config, compute=inference_compute(config.compute)), critic)
    read = actor_critic.abstract_held(config, critic, mesh)
    trained, frozen = actor_critic.abstract_trained(config, critic, mesh), actor_critic.frozen_of(config, read)
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        prepared = jax.eval_shape(
            lambda *params: engine.prepare(models.actor(*params), whole=rl.rollout_gathers_once), trained, frozen
        )
        shapes = RolloutShapes.of(rl.rollout_rows, None, rl.row_tokens)
    held: dict[str, Any] = {} if lora else {"reference": read.reference}
    has_reward_model = rl.reward_model is not None or not rl.reward_functions
    if has_reward_model and not (lora and rl.has_critic):
        held["reward model"] = read.reward
    return RolloutParts(
        prepared=place_shapes(mesh, prepared),
        shapes=shapes,
        prompt_tokens=rl.max_prompt_tokens,
        settings=Settings(rl.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
        answers=rl.answers,
        held=held,
    )


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: RLConfig, critic: ModelConfig) -> Objective:
    """Sum of the losses of actor and critic, which share no parameters."""
    rl, models, chunk = config.ppo, actor_critic.make_models(config, critic), config.compute.loss_chunk

    def actor_loss(new: Array, mask: Array, batch: Batch) -> tuple[Array, ppo.TokenLoss]:
        if rl.has_critic:
            found = ppo.policy_token_loss(new, batch[OLD], batch[ADVANTAGE], mask, rl.clip)
            return jnp.sum(found.loss), found
        found = grpo.token_loss(
            new, batch[OLD], batch[REFERENCE], batch[ADVANTAGE], mask, rl.clip, batch[COEFFICIENT]
        )  # fmt: skip
        return grpo.reduce_tokens(found.loss, mask, rl.reduction, rl.max_new_tokens)[0], found

    def weight(batch: Batch) -> Array:
        mask = batch["labels"] != IGNORED
        if rl.has_critic:
            return jnp.sum(mask, dtype=jnp.float32)
        return grpo.weight_of(jnp.sum(mask, axis=-1, dtype=jnp.float32), rl.reduction, rl.max_new_tokens)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        mask = batch["labels"] != IGNORED
        with jax.named_scope("actor"):
            new = label_log_probs(models.actor(params, frozen), batch, chunk)
            value, found = actor_loss(new, mask, batch)
        kl = ppo.kl_estimates(batch[OLD], new, mask)
        distance = jnp.sum(jnp.where(mask, jnp.abs(new - batch[OLD]), 0))
        tokens = jnp.sum(mask, dtype=jnp.float32)
        is_first = batch[UPDATE] == 0
        sums = {
            "tokens": tokens, "actor_loss": value, "weight": weight(batch), "clipped": jnp.sum(found.clipped),
            "kl_old_new": jnp.sum(kl.k3), "first_distance": jnp.where(is_first, distance, 0),
            "first_tokens": jnp.where(is_first, tokens, 0),
        }  # fmt: skip
        if rl.has_critic:
            with jax.named_scope("critic"):
                values = actor_critic.critic_values(models.critic(params, frozen), batch)
                of_values = ppo.value_token_loss(values, batch[VALUE], batch[RETURN], mask, rl.value_clip)
            sums |= {"critic_loss": jnp.sum(of_values.loss), "value_clipped": jnp.sum(of_values.clipped)}
            value += sums["critic_loss"]
        return value, Parts(jax.lax.stop_gradient(sums), {})

    return Objective(loss=loss, weight=weight, metrics=_metrics, summary=lambda metrics: f"loss {metrics['loss']:.4f}")


def _metrics(parts: Parts) -> dict[str, Array]:
    """Means over the updates of an iteration; `first_log_ratio` is of its first update, where it must be 0."""
    sums = parts.sums
    tokens, weight = jnp.maximum(sums["tokens"], 1.0), jnp.maximum(sums["weight"], 1.0)
    metrics = {
        "loss": sums["actor_loss"] / weight, "policy_loss": sums["actor_loss"] / weight,
        "clip_fraction": sums["clipped"] / tokens, "kl_old_new": sums["kl_old_new"] / tokens,
        "first_log_ratio": sums["first_distance"] / jnp.maximum(sums["first_tokens"], 1.0), "tokens": sums["tokens"],
    }  # fmt: skip
    if "critic_loss" in sums:
        value_loss = sums["critic_loss"] / weight
        metrics |= {"value_loss": value_loss, "value_clip_fraction": sums["value_clipped"] / tokens}
        metrics["loss"] += value_loss
    return metrics


# ----------------------------------------------------------------------------------------------------------------- job


def make_job(config: RLConfig, start: Start) -> Job:
    """The job of a completed `config`. Raises ValueError or FileNotFoundError, naming the field, if it can't start."""
    rl, metadata = config.ppo, start.metadata
    checks.check_initial_model(config)  # at a resume too: it is the reference
    changes = []
    if metadata is not None:
        changes = list_changes(config, metadata)
        checks.check_same_model(config, metadata, start.workdir)
        check_changes(config, metadata, start.workdir, changes)
        require(
            config.seed == metadata.config["seed"], "seed", config.seed,
            f"prompts and sampling depend on it; it must be that of the run in '{start.workdir}', "
            f"{metadata.config['seed']}",
        )  # fmt: skip
    tokenizer = Tokenizer(config.tokenizer)
    _check_tokenizers(config, start, tokenizer)
    check_exports(config, start.workdir)
    functions = [load_reward_function(name, "ppo.reward_functions") for name in rl.reward_functions]
    prompts = load_prompts(rl.prompts, tokenizer, rl.max_prompt_tokens, "ppo.prompts")
    digest = fingerprint(prompts.ids)
    if metadata is not None and metadata.job.get(PROMPTS, digest) != digest and jax.process_index() == 0:
        _log.warning("The prompts differ from those of the checkpoint of step %d.", start.step)
    asked = config.questions
    questions = read_questions(asked.path, asked, config.model.model_max_length, tokenizer)
    critic = actor_critic.critic_model(config)
    step, models = make_step(config, start.mesh), actor_critic.make_models(config, critic)
    held = actor_critic.load_held(config, start.mesh)
    checksums = _check_held(held, start)
    frozen = actor_critic.frozen_of(config, held)
    programs = actor_critic.make_programs(config, models, tuned_options(config, start.mesh))
    batches = Rollouts(config, start, prompts, tokenizer, models, programs, held, frozen, functions)

    def begin(workdir: Path) -> None:
        if jax.process_index() == 0:
            keep_tokenizer(workdir, config.tokenizer, tokenizer.fingerprint, start.step)
        print_plan(config, critic, prompts, functions, len(questions), start)
        print_changes(start.console, changes)

    return Job(
        objective=step.objective,
        optimizer=step.optimizer,
        abstract_state=step.state,
        init_state=lambda: init_state(actor_critic.init_trained(config, critic, held, start.mesh), step.optimizer),
        batches=batches,
        begin=begin,
        finish=lambda checkpoint, params: end_run(make_ending(config, checkpoint, params, start), start),
        flops_per_step=step.flops_per_step,
        flops_formula="those of actor and critic in all updates of an iteration, without decoding",
        frozen=frozen,
        examine=make_examine(lambda params: models.actor(params, frozen), tokenizer, questions, asked, start),
        language_model=lambda params: models.actor(params, frozen),
        metadata={"tokenizer_sha256": tokenizer.fingerprint, CHECKSUMS: checksums, PROMPTS: digest},
        updates=step.updates,
        check=lambda number, metrics: check_ratio(config, number, metrics),
        samples=True,
    )


def _check_tokenizers(config: RLConfig, start: Start, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer is not that of the chat model, the checkpoints and the reward model."""
    checks.check_tokenizer(config.model, tokenizer)
    checks.check_same_tokenizer(config, "tokenizer", tokenizer, start)
    path = config.ppo.reward_model
    if path is not None and (found := find_reward_model(path).tokenizer) is not None:
        owner = f"of ppo.reward_model = '{path}'"
        checks.require_same_tokenizer(config, "tokenizer", tokenizer, owner, file_sha256(found))


def _check_held(held: actor_critic.Held, start: Start) -> dict[str, str]:
    """Checksums of the models that are not trained. Raises ValueError if a resumed run had others."""
    fields = {"init_from": held.reference, "ppo.reward_model": held.reward}
    found = {name: f"{checksum(params):08x}" for name, params in fields.items() if params is not None}
    before = found if start.metadata is None else start.metadata.job.get(CHECKSUMS, found)
    for name, value in found.items():
        require(
            before.get(name, value) == value, name, value,
            f"this is the checksum of its parameters; it must be that of the run in '{start.workdir}', "
            f"{before.get(name)}: the same model in the same compute.dtype",
        )  # fmt: skip
    return found
