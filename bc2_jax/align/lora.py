"""LoRA adapters: read and written in PEFT's files, merged into the weights."""

from __future__ import annotations

from bc2_jax.convert.peft import load_peft, save_peft
from bc2_jax.model.lora import Adapter, merge

__all__ = ["Adapter", "load_peft", "merge", "save_peft"]
