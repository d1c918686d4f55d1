"""Baichuan 2 in JAX/Flax for TPU pods: pre-train, convert, run.

model = bc2_jax.load_pretrained("Baichuan2-7B-Base", dtype="bfloat16")
tokenizer = bc2_jax.Tokenizer(bc2_jax.find_tokenizer("Baichuan2-7B-Base"))
logits = model(jnp.array([tokenizer.encode("登鹳雀楼->")]))  # fp32 [B, T, V]
[text] = bc2_jax.generate_text(model, tokenizer, ["登鹳雀楼->"], max_new_tokens=64)
answer = bc2_jax.chat(model, tokenizer, [{"role": "user", "content": "你好"}])  # of a chat model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bc2_jax.version import __version__

if TYPE_CHECKING:
    from bc2_jax.align.conversation import Conversation, chat
    from bc2_jax.config import ComputeConfig, ModelConfig, TrainConfig
    from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
    from bc2_jax.convert.reading import Reading
    from bc2_jax.infer.generate import generate
    from bc2_jax.infer.text import find_eos_ids, generate_text
    from bc2_jax.model.baichuan import Baichuan2
    from bc2_jax.tokenizer import Tokenizer

__all__ = [
    "Baichuan2", "ComputeConfig", "Conversation", "ModelConfig", "Reading", "Tokenizer", "TrainConfig", "__version__",
    "chat", "find_eos_ids", "find_tokenizer", "generate", "generate_text", "load_pretrained",
]  # fmt: skip

# Imported at first use, so that `import bc2_jax` takes no time and a program that only tokenizes loads no JAX.
_MODULES = {
    "Baichuan2": "bc2_jax.model.baichuan",
    "ComputeConfig": "bc2_jax.config",
    "Conversation": "bc2_jax.align.conversation",
    "ModelConfig": "bc2_jax.config",
    "Reading": "bc2_jax.convert.reading",
    "Tokenizer": "bc2_jax.tokenizer",
    "TrainConfig": "bc2_jax.config",
    "chat": "bc2_jax.align.conversation",
    "find_eos_ids": "bc2_jax.infer.text",
    "find_tokenizer": "bc2_jax.convert.pretrained",
    "generate": "bc2_jax.infer.generate",
    "generate_text": "bc2_jax.infer.text",
    "load_pretrained": "bc2_jax.convert.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bc2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
