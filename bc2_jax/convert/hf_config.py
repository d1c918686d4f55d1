"""Reads and writes config.json and generation_config.json of a PyTorch folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bc2_jax.config import ModelConfig
from bc2_jax.convert.hf_keys import SPELLINGS, check_keys, lookup, read_number, rope_signs, scheme_signs
from bc2_jax.convert.reading import AS_SAID, Reading
from bc2_jax.convert.table import Layout
from bc2_jax.validation import show

HFDType = Literal["bfloat16", "float16", "float32"]

_log = logging.getLogger(__name__)
BAICHUAN2_VOCAB = 125_696
# Baichuan 1 has 64,000 tokens; its vocabulary may be padded or grown.
_BAICHUAN1_VOCAB = range(64_000, 65_001)
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Released sizes imply the position scheme: field -> (7B, 13B).
_RELEASED = {"hidden_size": (4096, 5120), "num_hidden_layers": (32, 40), "num_attention_heads": (32, 40)}


class Choice(NamedTuple):
    """A field that a released config.json does not contain."""

    value: Any
    why: str
    is_said: bool  # whether the config or the caller says so; otherwise it was inferred from other fields


def read_config(folder: str | Path, reading: Reading = AS_SAID) -> ModelConfig:
    """The ModelConfig of a folder's config.json with model_type baichuan or llama.

    Keys that change what the model computes are honoured or refused (`hf_keys`); other unknown keys are ignored and
    logged. Two fields that a released config.json lacks are inferred from the others, unless our own keys
    `position_embedding` and `normalize_head` or the `reading` give them; the reason is logged (`choose`). Raises
    FileNotFoundError or ValueError.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        if raw.get("model_type") not in ("baichuan", "llama"):
            raise ValueError(
                f"model_type = {show(raw.get('model_type'))} is not supported: only baichuan and llama are."
            )
        values = {name: value for name in _FIELDS if (value := _read_field(raw, name)) is not None}
        if absent := [name for name in _SIZES if name not in values]:
            raise ValueError(f"it has no {', '.join(absent)}.")
        values.setdefault("z_loss_weight", 0.0)  # the released class's default; ours is the paper's
        if "model_max_length" not in values and (length := _read_int(raw, "max_position_embeddings") or 0) > 0:
            values["model_max_length"] = length  # Baichuan-7B (1) has only this one
        for name, choice in choose(raw, reading).items():
            values[name] = choice.value
            if not choice.is_said:
                _log.info("%s: %s = %s, because %s.", path, name, choice.value, choice.why)
        config = ModelConfig(**values)
        warnings = check_keys(raw, config, reading.ignore_keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for warning in warnings:
        _log.warning("%s: %s", path, warning)
    return config


_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}


def _read_field(raw: Mapping[str, Any], name: str) -> Any:
    """The value of a ModelConfig field under any of its spellings; None if it is null or absent."""
    read = {"int": _read_int, "float": _read_float}.get(_FIELDS[name], _read_other)
    found = {key: value for key in SPELLINGS.get(name, (name,)) if (value := read(raw, key)) is not None}
    (first, value), *others = found.items() or [(name, None)]
    for other, contradicting in others:
        if contradicting != value:
            raise ValueError(f"{first} = {show(value)} contradicts {other} = {show(contradicting)}.")
    return value


def _read_int(raw: Mapping[str, Any], key: str) -> int | None:
    value = lookup(raw, key)
    if key.endswith("_token_id"):
        if isinstance(value, list):  # the first is the model's; `read_generation_config` keeps the others
            value = value[0] if value else None
        if isinstance(number := read_number(value), int) and number < 0:
            return None  # LLaMA's spelling of "none"
    if value is None:
        return None
    number = read_number(value)
    if number is None or number != int(number):
        raise ValueError(f"{key} = {show(value)} is not valid: expected int.")
    return int(number)


def _read_float(raw: Mapping[str, Any], key: str) -> float | None:
    value = lookup(raw, key)
    if value is None:
        return None
    if (number := read_number(value)) is None:
        raise ValueError(f"{key} = {show(value)} is not valid: expected float.")
    return float(number)


def _read_other(raw: Mapping[str, Any], key: str) -> Any:
    value, kind = raw.get(key), bool if _FIELDS[key] == "bool" else str
    if value is not None and type(value) is not kind:
        raise ValueError(f"{key} = {show(value)} is not valid: expected {kind.__name__}.")
    return value


def choose(raw: Mapping[str, Any], reading: Reading = AS_SAID) -> dict[str, Choice]:
    """Field -> choice, for the two fields that a released config.json does not contain.

    The position scheme must agree with all signs: the released number of heads and layers and width,
    `max_position_embeddings`, the spelling `BaiChuanForCausalLM`, RoPE settings. The head is plain for LLaMA, for that
    spelling and with Baichuan 1's vocabulary; otherwise a NormHead. Raises ValueError that names the deciding option if
    signs disagree.
    """
    choices = {}
    for name, tell in (("position_embedding", _tell_scheme), ("normalize_head", _tell_head)):
        flag = f"--{name.replace('_', '-')}"
        if (told := getattr(reading, name)) is not None:
            choices[name] = Choice(told, f"{flag} says so", True)
        elif (said := _read_other(raw, name)) is not None:
            choices[name] = Choice(said, "config.json says so", True)
        else:
            (value, why), *others = tell(raw)
            for other, reason in others:
                if other != value:
                    raise ValueError(
                        f"{name} is not clear: {why}, as with {value}, but {reason}, as with {other}; decide with "
                        f"{flag}{' rope|alibi' if name == 'position_embedding' else ' or --no-normalize-head'} of "
                        f'tools/convert.py, or with the key "{name}" in the file.'
                    )
            choices[name] = Choice(value, why, False)
    return choices


def _tell_scheme(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(scheme, reason) for each sign, the best one first."""
    if raw.get("model_type") == "llama":
        return [("rope", "LlamaForCausalLM has RoPE")]
    signs = []
    length = _read_int(raw, "max_position_embeddings") or 0
    if length > 0:  # otherwise it means no limit
        signs.append(("rope", f"max_position_embeddings = {length} is present"))
    for name, sizes in _RELEASED.items():
        size = _read_int(raw, name)
        for scheme, model, released in zip(("rope", "alibi"), ("7B", "13B"), sizes, strict=True):
            if size == released:
                signs.append((scheme, f"{name} = {size} is the {model} model's"))
    heads, width = _read_int(raw, "num_attention_heads") or 1, _read_int(raw, "hidden_size") or 1
    if heads & (heads - 1) and heads not in _RELEASED["num_attention_heads"] and width % heads == 0:
        signs.append(("alibi", f"num_attention_heads = {heads} is not a power of two, as only in the ALiBi model"))
    if _is_baichuan1_7b(raw):
        signs.append(("rope", "BaiChuanForCausalLM, so spelt, is Baichuan 1 with RoPE"))
    signs += [(scheme, f"{key} = {show(raw[key])}") for key, scheme in scheme_signs(raw).items()]
    signs += [("rope", f"{key} changes RoPE") for key in rope_signs(raw)]
    # Other engines decide by the width; the 7B model's needs no other sign.
    if length <= 0 and width != _RELEASED["hidden_size"][0]:
        why = f"max_position_embeddings is absent and hidden_size = {width} is not 4096"
        signs.insert(0, ("alibi", why))
    return signs


def _tell_head(raw: Mapping[str, Any]) -> list[tuple[bool, str]]:
    if raw.get("model_type") == "llama":
        return [(False, "LlamaForCausalLM has a plain head")]
    vocab, signs = _read_int(raw, "vocab_size"), []
    if _is_baichuan1_7b(raw):
        signs.append((False, "BaiChuanForCausalLM, so spelt, is Baichuan 1"))
    if vocab in _BAICHUAN1_VOCAB:
        signs.append((False, f"vocab_size = {vocab} is that of Baichuan 1"))
    if vocab == BAICHUAN2_VOCAB:
        signs.append((True, f"vocab_size = {vocab} is that of Baichuan 2, which has NormHead"))
    return signs or [(True, "Baichuan 2 has NormHead")]


def _is_baichuan1_7b(raw: Mapping[str, Any]) -> bool:
    architectures = raw.get("architectures")
    return isinstance(architectures, list) and "BaiChuanForCausalLM" in architectures


def write_config(
    config: ModelConfig, folder: str | Path, dtype: HFDType = "bfloat16", layout: Layout = "baichuan2"
) -> None:
    """Writes config.json. Baichuan layouts have the keys of a release and our own, so `read_config` restores exactly
    `config`; llama layouts are LlamaForCausalLM's or LlamaForSequenceClassification's.
    """
    raw = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **{name: getattr(config, name) for name in (*_IDS, *_SIZES, "rms_norm_eps", "initializer_range", "rope_theta")},
    }
    if config.position_embedding == "rope":  # other engines infer RoPE from its presence
        raw["max_position_embeddings"] = config.model_max_length
    if layout.startswith("llama"):
        is_reward_model = layout == "llama_reward"
        name = "LlamaForSequenceClassification" if is_reward_model else "LlamaForCausalLM"
        raw |= {"architectures": [name], "model_type": "llama"}
        if is_reward_model:  # one label: a number
            raw |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        raw |= {"num_key_value_heads": config.num_attention_heads, "head_dim": config.head_dim}
        # Without a version transformers 4.57 assumes that a large vocabulary's tokenizer has a known bug.
        raw |= {"attention_bias": False, "mlp_bias": False, "transformers_version": "4.29.2"}
    else:
        # Engines know Baichuan 1 with RoPE by its other spelling.
        baichuan1_7b = not config.normalize_head and config.position_embedding == "rope"
        raw["architectures"] = ["BaiChuanForCausalLM" if baichuan1_7b else "BaichuanForCausalLM"]
        raw |= {"model_type": "baichuan", "tokenizer_class": "BaichuanTokenizer", **dataclasses.asdict(config)}
    write_json(Path(folder) / "config.json", raw)


def read_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """generation_config.json, or None.

    If config.json lists several eos ids, those missing from generation_config.json are added.
    """
    path = Path(folder) / "generation_config.json"
    settings = read_json(path) if path.exists() else None
    raw = read_json(path.with_name("config.json"))
    ends = raw.get("eos_token_id")
    if not isinstance(ends, list) or len(ends) < 2:
        return settings
    if settings is None:
        settings = {name: raw[name] for name in ("pad_token_id", "bos_token_id") if raw.get(name) is not None}
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    return settings | {"eos_token_id": [*named, *(end for end in ends if end not in named)]}


def write_generation_config(config: ModelConfig, folder: Path, released: Mapping[str, Any] | None = None) -> None:
    """Writes the released generation config, or the special ids alone if there was none.

    Sampling settings belong to a chat model and come with its file. transformers applies a repetition penalty in greedy
    decoding too, which would change a base model's answers in an evaluation.
    """
    ids = {name: getattr(config, name) for name in _IDS}
    write_json(folder / "generation_config.json", ids if released is None else released)


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
