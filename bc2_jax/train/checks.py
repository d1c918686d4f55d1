"""Checks before a run starts: model, tokenizer, rows, sample prompts, export."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import jax

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ModelConfig, RewardConfig, RunConfig, TrainConfig, differing_fields
from bc2_jax.convert.checkpoints import explain_quantized
from bc2_jax.convert.folder import check_free, foreign_in_export
from bc2_jax.convert.pretrained import find_any_model, find_model
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.loader import changed_row_order
from bc2_jax.files import file_sha256
from bc2_jax.metadata import Metadata, parse_model_config
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.loop import Start
from bc2_jax.validation import require

_CONTENTS = {"text": "text", "chat": "conversations", "pairs": "pairs of answers (tools/prepare_chat.py --pairs)"}
EXPORT_NAME = "hf"
"""Folder of the export in the workdir."""
_log = logging.getLogger(__name__)


def check_same_model(config: RunConfig, metadata: Metadata, workdir: Path) -> None:
    """Raises ValueError, naming the fields that differ, if the checkpoint has another architecture."""
    saved = _with_free_fields(parse_model_config({"config": metadata.config}, workdir), config.model)
    if lines := differing_fields(config.model, saved):
        raise ValueError(
            f"The model differs from the checkpoints in '{workdir}' in these fields (now against then): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def _with_free_fields(found: ModelConfig, model: ModelConfig) -> ModelConfig:
    """`found` with the fields that a run may choose freely taken from `model`."""
    free = {name: getattr(model, name) for name in ("z_loss_weight", "initializer_range", "model_max_length")}
    return dataclasses.replace(found, **free)


def warn_of_other_rows(config: TrainConfig, metadata: Metadata, step: int) -> None:
    """Logs which changed fields make a resumed run read other rows than the original run would have."""
    recorded = metadata.job.get("row_order")
    if jax.process_index() != 0 or recorded is None:
        return
    if names := changed_row_order(recorded, config.data, metadata.tokens):
        _log.warning(
            "The data changed since the checkpoint of step %d: %s. Some rows may be trained on twice, others never.",
            step, ", ".join(names),
        )  # fmt: skip


def check_initial_model(config: RunConfig) -> None:
    """Raises ValueError, naming the fields that differ, if `init_from` has another architecture; also if it is
    quantized, or a reward model while the run does not train one."""
    if config.init_from is None:
        return
    find = find_any_model if isinstance(config, RewardConfig) else find_model
    model = find(config.init_from)
    if model.is_quantized:
        raise ValueError(explain_quantized(model.path))
    found = _with_free_fields(model.config, config.model)
    if lines := differing_fields(config.model, found, "model."):
        raise ValueError(
            f"init_from = '{config.init_from}' is of another architecture; these differ (this run's against its): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def check_tokenizer(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer has ids that the model lacks, or another end-of-text id."""
    require(
        tokenizer.vocab_size <= model.vocab_size, "model.vocab_size", model.vocab_size,
        f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces",
    )  # fmt: skip
    require(
        tokenizer.eos_id == model.eos_token_id, "model.eos_token_id", model.eos_token_id,
        f"the tokenizer {tokenizer.path} has {tokenizer.eos_id}",
    )  # fmt: skip


def check_row_kinds(config: TrainConfig) -> None:
    """Raises ValueError if a source has rows of a kind that this kind of run does not train on."""
    for index, source in enumerate(config.data.sources):
        for part in list_parts(source.path):
            kind = part.manifest.kind
            legal = f"it has rows of {_CONTENTS[kind]}, and a {type(config).__name__} trains on " + " or ".join(
                _CONTENTS[legal] for legal in config.row_kinds
            )
            require(kind in config.row_kinds, f"data.sources.{index}.path", str(part.path), legal)


def check_same_tokenizer(config: RunConfig, field: str, tokenizer: Tokenizer, start: Start) -> None:
    """Raises ValueError, naming `field`, if the model that training starts or resumes from had another tokenizer."""
    if start.metadata is not None:
        before, known = start.workdir / TOKENIZER_NAME, start.metadata.job.get("tokenizer_sha256")
    elif config.init_from is not None and (found := find_any_model(config.init_from).tokenizer) is not None:
        before, known = found, None
    else:
        return
    known = known or (file_sha256(before) if before.is_file() else tokenizer.fingerprint)
    require_same_tokenizer(config, field, tokenizer, f"that the model was trained with ({before})", known)


def require_same_tokenizer(config: RunConfig, field: str, tokenizer: Tokenizer, other: str, sha256: str) -> None:
    """Raises ValueError, naming `field`, unless the tokenizer has this SHA-256 or `allow_other_tokenizer` is set.

    With another tokenizer the same ids would stand for other text. `other` describes the expected one.
    """
    require(
        tokenizer.fingerprint == sha256 or config.allow_other_tokenizer, field, str(tokenizer.path),
        f"its SHA-256 is {tokenizer.fingerprint[:12]}, that of the tokenizer {other} is {sha256[:12]}, so the same ids "
        "mean other text; set allow_other_tokenizer to use it anyway",
    )  # fmt: skip


def check_samples(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError for sample prompts that generation would refuse at the end of the run."""
    sample, limit = config.sample, config.model.model_max_length
    for index, prompt in enumerate(sample.prompts):
        length = len(tokenizer.encode(prompt))
        require(length > 0, f"sample.prompts.{index}", prompt, "it must have at least one token")
        require(
            length + sample.max_new_tokens <= limit, "sample.max_new_tokens", sample.max_new_tokens,
            f"with the {length} tokens of {prompt!r} it must be at most model.model_max_length = {limit}",
        )  # fmt: skip


def check_export(config: RunConfig, workdir: Path) -> None:
    """Raises FileExistsError if the final export could not replace what is in its place."""
    if config.export_hf:
        check_free(workdir / EXPORT_NAME, True, foreign_in_export)
