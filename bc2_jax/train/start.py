"""What a run checks and prepares before its first step."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from bc2_jax.checkpoint import parse_model_config
from bc2_jax.config import TrainConfig, differing_fields
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.data.row_order import changed_row_order
from bc2_jax.model.baichuan import Params, abstract_params, init_params
from bc2_jax.sharding import DEFAULT_RULES
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.tpu.chips import DEVICE_KINDS
from bc2_jax.tpu.options import compiler_options
from bc2_jax.train.optimizer import make_optimizer
from bc2_jax.train.step import TrainState

_log = logging.getLogger(__name__)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless it is empty or JAX_COMPILATION_CACHE_DIR names another."""
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a run was here."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def choose_workdir(config: TrainConfig) -> Path:
    """The workdir of the config; else of runs/NAME, runs/NAME-2, ... the first free one; to resume, the last used."""
    if config.workdir is not None:
        return Path(config.workdir)
    candidates = [Path("runs", config.name)]
    while holds_checkpoints(candidates[-1]):  # a run that failed at its start leaves none
        candidates.append(Path("runs", f"{config.name}-{len(candidates) + 1}"))
    return candidates[-2] if config.resume == "auto" and len(candidates) > 1 else candidates[-1]


def check_same_model(config: TrainConfig, metadata: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError, naming the fields that differ, if a checkpoint is of another architecture."""
    if lines := differing_fields(config.model, parse_model_config(metadata, workdir)):
        raise ValueError(
            f"model is not that of the checkpoints in '{workdir}'; these fields differ (now against then): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def warn_of_other_rows(config: TrainConfig, metadata: dict[str, Any], step: int) -> None:
    """Logs which fields make a run that goes on from a checkpoint read other rows than it would have read."""
    recorded = metadata.get("row_order")
    if jax.process_index() == 0 and recorded is not None and (names := changed_row_order(recorded, config.data, step)):
        _log.warning(
            "The data is not that of the checkpoint of step %d, which it goes on from: %s changed. Rows that were "
            "trained on may come again, others never.", step, ", ".join(names),
        )  # fmt: skip


def tuned_options(config: TrainConfig, mesh: Mesh) -> dict[str, Any] | None:
    """The compiler options of the training step on the mesh's chips; None leaves the choice to the compiler."""
    generation = DEVICE_KINDS.get(mesh.devices.flat[0].device_kind)
    if generation is None or config.compute.compiler_options == "default":
        return None
    return dict(compiler_options(generation))


def check_attention(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError if the devices cannot run the attention kernel that the config names."""
    platform = mesh.devices.flat[0].platform
    if config.compute.attention == "flash" and platform != "tpu":
        raise ValueError(
            f"compute.attention = 'flash' is not valid on {platform}: it is written for TPU; legal values here are "
            "chunked and reference."
        )


def check_initial_model(config: TrainConfig) -> None:
    """Raises ValueError, naming the fields that differ, if `init_from` is of another architecture."""
    if config.init_from is None:
        return
    found = find_model(config.init_from).config
    # What says how to train or how far to go is the run's to choose.
    chosen = {name: getattr(config.model, name) for name in ("z_loss_weight", "initializer_range", "model_max_length")}
    if lines := differing_fields(config.model, dataclasses.replace(found, **chosen), "model."):
        raise ValueError(
            f"init_from = '{config.init_from}' is of another architecture; these differ (the run's against its): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def initial_params(config: TrainConfig, mesh: Mesh) -> Params:
    """Those of `init_from` in fp32, each device reading its own part, or random ones."""
    if config.init_from is None:
        return init_params(config.model, config.seed, mesh)
    return load_params(config.init_from, "float32", mesh)[0]


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer can produce ids the model does not have, or ends documents with another id."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is not valid: the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} pieces."
        )
    if tokenizer.eos_id != config.model.eos_token_id:
        raise ValueError(
            f"model.eos_token_id = {config.model.eos_token_id} is not valid: the tokenizer has {tokenizer.eos_id}."
        )


class Restorer(Protocol):
    """A Checkpointer, or another reader of its checkpoints."""

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]: ...


def restore_state(checkpointer: Restorer, step: int, config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state saved at a step, on this mesh whatever the mesh it was saved from."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Under an explicit mesh eval_shape gives each moment the spec of its parameter; counters have none.
        spec = DEFAULT_RULES.spec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = abstract_params(config.model, mesh)
    opt_state = jax.tree.map(place, jax.eval_shape(make_optimizer(config.optimizer).init, params))
    params, opt_state = checkpointer.restore(step, params, opt_state)
    # Updates done are fewer than steps where some were skipped. A copy: the step donates both.
    count = next(
        leaf for path, leaf in jax.tree.leaves_with_path(opt_state) if jax.tree_util.keystr(path).endswith(".count")
    )
    return TrainState(params, opt_state, jax.device_put(jnp.copy(count), NamedSharding(mesh, DEFAULT_RULES.spec())))
