"""What each key of PEFT's adapter_config.json means here: part of a LoraConfig, one supported value, or nothing.

The keys are those that PEFT 0.3 to 0.21 write. One that changes what an adapter computes is honoured or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bc2_jax.validation import show

_HONOURED = """
r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules use_rslora use_dora base_model_name_or_path
"""
_MUST_BE_EMPTY = """
modules_to_save lora_bias fan_in_fan_out layers_to_transform layer_replication use_qalora use_bdlora
alora_invocation_tokens trainable_token_indices target_parameters arrow_config kasa_config monteclora_config
velora_config megatron_config enable_lora merge_weights
"""
# How it was initialised or trained, where the adapter may sit, settings of what is refused, notes.
_HARMLESS = """
auto_mapping inference_mode revision peft_version megatron_core qalora_group_size ensure_weight_tying exclude_modules
layers_pattern loftq_config corda_config eva_config lora_ga_config runtime_config
"""
_WITHOUT_CHECK = frozenset([*_HONOURED.split(), *_HARMLESS.split()])
# Key -> values with which nothing is computed that we do not compute. What is null, false or empty is legal too.
_ONLY: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others than these change the weights of the base model before training (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA ...).
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "task_type": ("CAUSAL_LM",),
    **dict.fromkeys(_MUST_BE_EMPTY.split(), ()),
}
_HARMLESS_PATTERN = re.compile(r"version$|comment|license|^_|name|path")


def check_keys(raw: Mapping[str, Any], where: object) -> None:
    """Raises ValueError for the first key with which the adapter computes something that we do not."""
    for key, value in raw.items():
        if key in _WITHOUT_CHECK or value is None or value is False or value in ("", [], {}):
            continue
        if key in _ONLY:
            legal = _ONLY[key]
            if not any(value is item or (isinstance(item, str) and value == item) for item in legal):
                only = f"only {' or '.join(map(_json, legal))} is" if legal else "it must be null, false or empty"
                raise ValueError(f"{where}: {key} = {show(value)} is not supported: {only}.")
        elif not _HARMLESS_PATTERN.search(key):
            raise ValueError(
                f"{where}: {key} = {show(value)} is not known and may change what the adapter computes; if it does "
                "not, take the key out of the file."
            )


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
