"""Finds and loads reward models, and the critics of PPO runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from bc2_jax.config import DType, ModelConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.convert.adapter import lora_config, place_adapter, read_adapter
from bc2_jax.convert.checkpoints import (
    ACTOR,
    CRITIC,
    holds_reward_model,
    newest_checkpoint,
    open_metadata,
    open_params,
    policy_part,
    take_part,
)
from bc2_jax.convert.pretrained import find_any_model, find_tokenizer, open_reader, place_params, reader_of
from bc2_jax.convert.table import Shape, flatten, param_shapes
from bc2_jax.metadata import parse_model_config
from bc2_jax.model.baichuan import Params, param_shardings
from bc2_jax.model.lora import Adapter, merge
from bc2_jax.model.reward import HEAD, SCORE, RewardModel, backbone_of

ADAPTER = "adapter"
"""The part of `params` with the adapter, if a run trained `score` and an adapter."""
STATISTICS_NAME = "rewards.json"
"""In a reward model's run folder: {"STEP": {"mean", "std", "answers"}} of rewards of held-out answers."""
SCORE_PATH = f"{SCORE}.weight"


@dataclasses.dataclass(frozen=True)
class FoundRewardModel:
    """A reward model on disk; only its config has been read."""

    path: Path
    config: ModelConfig
    tokenizer: Path | None  # tokenizer.model in the folder of the checkpoint or its run
    lora: LoraConfig | None = None  # config of its adapter; None if all parameters were trained
    base: str | None = None  # path of the model that the run started from; its backbone is the adapter's base
    statistics: Mapping[str, float] | None = None
    """"mean" and "std" of rewards of held-out answers, and the number of "answers", if known."""
    part: str = ""  # its part of the checkpoint's parameters: "" for all, or CRITIC


def find_reward_model(path: str | Path) -> FoundRewardModel:
    """The reward model in `path`: a checkpoint, or a run's newest complete checkpoint.

    Raises FileNotFoundError or ValueError as `find_model`, and ValueError for a language model.
    """
    found = find_any_model(path)
    if not found.is_reward_model:
        raise ValueError(
            f"{path} is a language model, not a reward model: train one with `python train.py "
            f"configs/baichuan2_13b_reward.py --init-from {path}` on pairs of answers."
        )
    lora, base = lora_config(found.path, found.metadata), found.metadata["config"].get("init_from")
    return FoundRewardModel(found.path, found.config, found.tokenizer, lora, base, read_statistics(found.path))


def describe_reward_model(path: str | Path) -> tuple[str, ...]:
    """Lines that describe the reward model in `path`; empty if there is none. Raises as `find_reward_model`."""
    checkpoint = newest_checkpoint(Path(path).absolute())
    if checkpoint is None or not holds_reward_model(open_metadata(checkpoint)):
        return ()
    found = find_reward_model(checkpoint)
    model, known = found.config, found.statistics
    lines = [
        f"reward model: {found.path}",
        f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, {model.position_embedding}; a score in "
        "place of the head",
        f"trained: all parameters, from {found.base}" if found.lora is None else f"beside {found.base}, the score and "
        f"{found.lora.describe()}",
    ]  # fmt: skip
    if known is not None:
        lines.append(
            f"rewards of {known['answers']:,.0f} held-out answers: mean {known['mean']:.4f}, standard deviation "
            f"{known['std']:.4f}"
        )
    return tuple(lines)


def find_critic(path: str | Path) -> FoundRewardModel:
    """The critic in a PPO checkpoint or run: a reward model whose score is the value of every token.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it has no critic.
    """
    checkpoint = newest_checkpoint(Path(path).absolute())
    if checkpoint is None:
        raise FileNotFoundError(f"{path} is not a bc2_jax run or checkpoint.")
    metadata = open_metadata(checkpoint)
    if policy_part(metadata) != ACTOR or not take_part(open_params(checkpoint), CRITIC):
        raise ValueError(f"{path} has no critic: it is not a checkpoint or run of PPO.")
    reward_model = metadata["config"]["ppo"].get("reward_model")
    lora = lora_config(checkpoint, metadata)
    # Without a reward model the critic started from the actor's base model.
    base = metadata["config"].get("init_from") if reward_model is None else reward_model
    config = parse_model_config(metadata, checkpoint)
    if reward_model is not None:
        config = find_reward_model(reward_model).config
    try:
        tokenizer = find_tokenizer(checkpoint)
    except FileNotFoundError:
        tokenizer = None
    return FoundRewardModel(checkpoint, config, tokenizer, lora, base, None, CRITIC)


def read_statistics(checkpoint: Path) -> dict[str, float] | None:
    """Recorded statistics of rewards of held-out answers; None if they are missing or unusable."""
    try:
        record = json.loads((checkpoint.parent.parent / STATISTICS_NAME).read_bytes())[checkpoint.name]
        found = {name: float(record[name]) for name in ("mean", "std", "answers")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if all(map(math.isfinite, found.values())) else None


def load_reward_model(
    path: str | Path, dtype: DType = "float32", mesh: Mesh | None = None
) -> tuple[Params, ModelConfig, FoundRewardModel]:
    """(parameters of a `model.reward.RewardModel`, its architecture, what was found) of the reward model in `path`.

    The backbone is in `dtype`, with an adapter merged into the model that the run started from; `score` is fp32. With a
    mesh each device reads its own shard. Raises FileNotFoundError or ValueError.
    """
    found = find_reward_model(path)
    return load_found(found, dtype, mesh), found.config, found


def load_critic(
    path: str | Path, dtype: DType = "float32", mesh: Mesh | None = None
) -> tuple[Params, ModelConfig, FoundRewardModel]:
    """`load_reward_model` of the critic in `path` (`find_critic`)."""
    found = find_critic(path)
    return load_found(found, dtype, mesh), found.config, found


def load_found(found: FoundRewardModel, dtype: DType, mesh: Mesh | None) -> Params:
    """Parameters of a found reward model, as in `load_reward_model`."""
    shardings = None if mesh is None else flatten(param_shardings(found.config, mesh, RewardModel))
    score: dict[str, Shape] = {SCORE_PATH: (found.config.hidden_size,)}
    arrays = open_params(found.path, jax.process_index(), jax.process_count(), found.part)
    if found.lora is None:
        backbone = backbone_shapes(found.config)
        read = reader_of(arrays, backbone | score, found.path)
        params = place_params(backbone, shardings, dtype, read)
    else:
        adapted = take_part(arrays, ADAPTER)
        rest = {name: array for name, array in arrays.items() if not name.startswith(f"{ADAPTER}.")}
        read = reader_of(rest, score, found.path)
        adapter = read_adapter(adapted, found.lora, found.config, found.path)
        params = merge(_load_base(found, dtype, mesh), Adapter(found.lora, place_adapter(adapter, found.config, mesh)))
    return params | place_params(score, shardings, "float32", read)


def _load_base(found: FoundRewardModel, dtype: DType, mesh: Mesh | None) -> Params:
    """The backbone that an adapter is for."""
    what = f"{found.path} has a reward model's adapter and score, and needs the model that its run started from"
    if found.base is None:
        raise ValueError(f"{what}, which it does not name.")
    try:
        params, config = load_backbone(found.base, dtype, mesh)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: {error}") from error
    if param_shapes(config) != param_shapes(found.config):
        raise ValueError(f"{what}: {found.base} is of another architecture.")
    return params


def load_score(path: str | Path, mesh: Mesh | None = None) -> Params:
    """{"weight": fp32 [D]} of the reward model in `path`; reads nothing else."""
    found = find_reward_model(path)
    score: dict[str, Shape] = {SCORE_PATH: (found.config.hidden_size,)}
    arrays = open_params(found.path, jax.process_index(), jax.process_count(), found.part)
    read = reader_of({name: array for name, array in arrays.items() if name in score}, score, found.path)
    shardings = None if mesh is None else flatten(param_shardings(found.config, mesh, RewardModel))
    return place_params(score, shardings, "float32", read)[SCORE]


def load_backbone(path: str | Path, dtype: DType = "float32", mesh: Mesh | None = None) -> tuple[Params, ModelConfig]:
    """Embedding, layers and norm of the model in `path`: a language model, without its head, or a reward model.

    Placed as in `load_reward_model`; raises as it does.
    """
    found = find_any_model(path)
    if found.is_reward_model:
        params, config, _ = load_reward_model(path, dtype, mesh)
        return backbone_of(params), config
    shardings = None if mesh is None else flatten(param_shardings(found.config, mesh))
    return place_params(backbone_shapes(found.config), shardings, dtype, open_reader(found)), found.config


def backbone_shapes(config: ModelConfig) -> dict[str, Shape]:
    return {name: shape for name, shape in param_shapes(config).items() if not name.startswith(f"{HEAD}.")}
