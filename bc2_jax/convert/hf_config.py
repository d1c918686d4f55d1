"""config.json and generation_config.json of a PyTorch folder: what they say, leave unsaid, and may not say."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bc2_jax.config import ModelConfig
from bc2_jax.convert.table import Layout

HFDType = Literal["bfloat16", "float16", "float32"]

_log = logging.getLogger(__name__)
_BAICHUAN1_VOCAB = 64_000


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json.

    Two things that a released config.json does not say are inferred, unless our own keys `position_embedding` and
    `normalize_head` say them, and the log tells why: `max_position_embeddings` or hidden_size 4096 means RoPE,
    otherwise ALiBi; the spelling `BaiChuanForCausalLM` or 64,000 tokens means Baichuan 1, which has no NormHead.
    Raises ValueError if a key is missing or has a value that this library does not implement.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    _refuse_unsupported(path, raw)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in raw:
            continue
        value, kind = raw[field.name], {"int": int, "float": float, "bool": bool}.get(str(field.type), str)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{path}: {field.name} = {value!r} is not valid: expected {kind.__name__}.")
        values[field.name] = value
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if absent := [name for name in sizes if name not in values]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")
    values.setdefault("z_loss_weight", 0.0)  # the released class's default; ours is the paper's
    if "model_max_length" not in values and type(raw.get("max_position_embeddings")) is int:
        values["model_max_length"] = raw["max_position_embeddings"]  # Baichuan-7B (1) has only this one
    for name, (value, why) in infer(raw).items():
        if name not in values:
            values[name] = value
            _log.info("%s: %s = %s, because %s.", path, name, value, why)
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def infer(raw: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Field -> (value, reason) for what a released config.json does not say."""
    if raw.get("max_position_embeddings") is not None:
        position = ("rope", f"max_position_embeddings = {raw['max_position_embeddings']} is present")
    elif raw["hidden_size"] == 4096:
        position = ("rope", "hidden_size = 4096 is the 7B model's")
    else:
        position = ("alibi", f"max_position_embeddings is absent and hidden_size = {raw['hidden_size']} is not 4096")
    if "BaiChuanForCausalLM" in (raw.get("architectures") or ()):
        head = (False, "BaiChuanForCausalLM, so spelt, is Baichuan 1")
    elif raw["vocab_size"] == _BAICHUAN1_VOCAB:
        head = (False, f"vocab_size = {_BAICHUAN1_VOCAB} is Baichuan 1's")
    else:
        head = (True, "Baichuan 2 has NormHead")
    return {"position_embedding": position, "normalize_head": head}


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != "baichuan":
        raise ValueError(f"{path}: model_type = {raw.get('model_type')!r} is not supported: only baichuan is.")
    heads = raw.get("num_attention_heads")
    for key, supported in {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_key_value_heads": heads,
        "rope_scaling": None,
        "quantization_config": None,
    }.items():
        if raw.get(key, supported) not in (supported, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported: only {json.dumps(supported)} is.")


def write_config(
    config: ModelConfig, folder: str | Path, dtype: HFDType = "bfloat16", layout: Layout = "baichuan2"
) -> None:
    """Writes config.json. In the Baichuan layouts it has the keys of a release and our own, so that `read_config` gives
    back exactly `config`; in the llama layout it is that of LlamaForCausalLM.
    """
    raw = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "rope_theta": config.rope_theta,
    }
    if config.position_embedding == "rope":  # its presence is how other engines tell RoPE from ALiBi
        raw["max_position_embeddings"] = config.model_max_length
    if layout == "llama":
        raw |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        raw |= {"num_key_value_heads": config.num_attention_heads, "head_dim": config.head_dim}
        # Without a version transformers 4.57 takes a large vocabulary's tokenizer for one with a known mistake.
        raw |= {"attention_bias": False, "mlp_bias": False, "transformers_version": "4.29.2"}
    else:
        # Baichuan 1 with RoPE is the one that engines know by its other spelling.
        baichuan1_7b = not config.normalize_head and config.position_embedding == "rope"
        raw["architectures"] = ["BaiChuanForCausalLM" if baichuan1_7b else "BaichuanForCausalLM"]
        raw |= {"model_type": "baichuan", "tokenizer_class": "BaichuanTokenizer", **dataclasses.asdict(config)}
    write_json(Path(folder) / "config.json", raw)


def read_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """generation_config.json, if there is one."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.exists() else None


def write_generation_config(config: ModelConfig, folder: Path, released: Mapping[str, Any] | None = None) -> None:
    """Writes the file that came with the model, or else the released defaults of chat."""
    defaults = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "user_token_id": 195,
        "assistant_token_id": 196,
        "max_new_tokens": 2048,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    write_json(folder / "generation_config.json", defaults if released is None else released)


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return raw


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
