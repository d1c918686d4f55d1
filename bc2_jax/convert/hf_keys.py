"""Meaning of each config.json key: a ModelConfig field, a setting with one supported value, or harmless.

A key that changes what the model computes is honoured, or refused unless it has the supported value; other keys are
never refused. Covers the keys of transformers 4 and 5, Baichuan 1 and 2 and LLaMA's relatives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bc2_jax.config import ModelConfig
from bc2_jax.validation import show

DEFAULT_ROPE_THETA = 10_000.0
_ROPE_DICTS = ("rope_parameters", "rope_scaling")
SPELLINGS = {
    "rope_theta": (
        "rope_theta", "rotary_emb_base", "rope_base", "rotary_base",
        *(f"{name}.{entry}" for name in _ROPE_DICTS for entry in ("rope_theta", "base")),
    ),
}  # fmt: skip
"""Field -> its names in config.json, if it has several; a dot leads into a dict."""

_OFF, _ONE = (False, 0), (1,)


def _names(text: str, legal: tuple) -> dict[str, tuple]:
    return dict.fromkeys(text.split(), legal)


# Key -> supported values; null and empty are legal too.
_ONLY: dict[str, tuple] = {
    **_names("hidden_act hidden_activation activation_function activation act_fn", ("silu", "swish")),
    **_names("norm_type normalization normalization_type", ("rmsnorm", "rms_norm", "rms")),
    **_names("attention_bias mlp_bias bias use_bias qkv_bias use_qkv_bias add_qkv_bias add_bias_linear", _OFF),
    **_names("lm_head_bias o_proj_bias attention_out_bias head_bias", _OFF),
    **_names("qk_layernorm use_qk_norm qk_norm use_qk_layernorm clip_qkv qkv_clip learned_pos_emb", _OFF),
    **_names("tie_word_embeddings use_parallel_residual parallel_attn new_decoder_architecture", _OFF),
    **_names("apply_residual_connection_post_layernorm residual_post_layernorm", _OFF),
    **_names("multi_query multi_query_attention add_cross_attention cross_attention_hidden_size", _OFF),
    **_names("is_encoder_decoder use_bidirectional_attention attn_temperature_tuning mup use_mup", _OFF),
    **_names("attn_logit_softcapping final_logit_softcapping logit_softcapping attn_logit_softcap", _OFF),
    **_names("final_logit_softcap logit_softcap use_logn_attn use_dynamic_ntk attention_chunk_size", _OFF),
    **_names("num_experts num_local_experts n_routed_experts n_shared_experts moe_layers pre_seq_len", _OFF),
    **_names("quantization_config quantization compression_config load_in_4bit load_in_8bit pruned_heads", _OFF),
    **_names("residual_multiplier embedding_multiplier logits_scaling logit_scale scale_emb emb_scale", _ONE),
    **_names("embedding_scale embedding_fraction hidden_scale", _ONE),
    **_names("is_causal causal no_bias scale_attn_weights", (True,)),
}
_ONLY_ROPE: dict[str, tuple] = {
    **_names("partial_rotary_factor rotary_pct rotary_percent rotary_fraction", _ONE),
    **_names("rope_ratio rope_condense_ratio condense_ratio rope_factor rope_scale rope_scaling_factor", _ONE),
    **_names("ntk_factor ntk_alpha rope_alpha position_scale", _ONE),
    **_names("rope_interleaved rope_interleave rotary_interleaved rotary_emb_interleaved rope_traditional", _OFF),
    **_names("rope_local_base_freq no_rope_layer_interval use_xpos xpos use_mrope", _OFF),
}
# Key -> the value implied by ModelConfig fields.
_FOLLOWS: dict[str, Callable[[ModelConfig], float]] = {
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num", "n_head", "n_heads"),
        lambda config: config.num_attention_heads,
    ),
    **dict.fromkeys(
        ("head_dim", "head_size", "kv_channels", "d_head", "v_head_dim", "qk_head_dim", "query_pre_attn_scalar"),
        lambda config: config.head_dim,
    ),
    **dict.fromkeys(("n_embd", "d_model", "dim", "dim_model_base"), lambda config: config.hidden_size),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), lambda config: config.num_hidden_layers),
    **dict.fromkeys(("ffn_hidden_size", "ffn_dim", "n_inner"), lambda config: config.intermediate_size),
    **dict.fromkeys(("padded_vocab_size", "n_vocab"), lambda config: config.vocab_size),
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_epsilon"),
        lambda config: config.rms_norm_eps,
    ),
    "attention_multiplier": lambda config: config.head_dim**-0.5,
    "scale_depth": lambda config: config.num_hidden_layers**0.5,
}
_FOLLOWS_ROPE: dict[str, Callable[[ModelConfig], float]] = {"rotary_dim": lambda config: config.head_dim}
_POSITION_KEYS = ("position_embedding_type", "pos_emb", "pos_embed", "alibi", "use_alibi")
# Settings of training, generation, other tasks and implementation, and notes on the origin.
_HARMLESS = """
architectures auto_map model_type torch_dtype dtype use_cache cache_implementation transformers_version
tokenizer_class name_or_path attn_implementation output_attentions output_hidden_states output_scores return_dict
return_dict_in_generate torchscript use_bfloat16 fp16 bf16 fp32 chunk_size_feed_forward finetuning_task id2label
label2id num_labels problem_type task_specific_params prefix is_decoder sep_token_id cls_token_id mask_token_id
unk_token_id decoder_start_token_id user_token_id assistant_token_id pretraining_tp gradient_checkpointing
tie_encoder_decoder tf_legacy_loss use_return_dict max_position_embeddings original_max_position_embeddings
max_sequence_length max_seq_len max_seq_length seq_length alibi_bias_max max_window_layers slow_but_exact onnx_safe
revision initializer_factor logits_to_keep num_logits_to_keep renormalize_logits guidance_scale low_memory
penalty_alpha keys_to_ignore_at_inference pad_to_multiple_of init_device init_std unsloth_version unsloth_fixed
scale_attention_softmax_in_fp32 softmax_in_fp32 max_length max_new_tokens min_length do_sample early_stopping
num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size num_return_sequences encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id
forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
router_aux_loss_coef aux_loss_alpha output_router_logits attention_softmax_in_fp32 resid_in_fp32 residual_in_fp32
fused_mlp fused_bias_fc
"""
_HARMLESS_NAMES = frozenset(_HARMLESS.split())
_HARMLESS_PATTERN = re.compile(r"^_|flash|implementation|xformers|sdpa|memory_efficient|version$|comment|license")
_DROPOUT = re.compile(r"dropout|_pdrop$|drop_path|layerdrop|jitter")
# Patterns of keys that change what a model computes.
_SUSPICIOUS = re.compile(
    r"rope|rotary|ntk|yarn|scal|cap|window|slid|norm|bias|attn|attention|head|kv|qk|expert|moe|activ|act_|_act|multipl"
    r"|factor|alibi|position|logit|residual|sparse|mask|mup|layer|embed|hidden|mlp|ffn|quant|lora|adapter|gate|theta"
    r"|freq|causal|clip|memory|recur|conv|vision_|audio_"
)


def lookup(raw: Mapping[str, Any], name: str) -> Any:
    """raw["a"]["b"] for the name "a.b"; None if absent."""
    value: Any = raw
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def read_number(value: Any) -> float | int | None:
    """A number of config.json, or one in a string ("1e-06"); None for anything else, including infinity and NaN."""
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def rope_signs(raw: Mapping[str, Any]) -> list[str]:
    """Keys that only a model with RoPE would have, because they change it."""
    names = [n for n in SPELLINGS["rope_theta"] if read_number(lookup(raw, n)) not in (None, DEFAULT_ROPE_THETA)]
    names += [name for name, legal in _ONLY_ROPE.items() if name in raw and not _is_legal(raw[name], legal)]
    return names + [name for name in _ROPE_DICTS if lookup(raw, name) and not _keeps_rope(lookup(raw, name))]


def scheme_signs(raw: Mapping[str, Any]) -> dict[str, str]:
    """Key -> position scheme, for the keys by which other models name it."""
    found = {}
    for name in _POSITION_KEYS:
        value = raw.get(name)
        if value is True or str(value).lower() == "alibi":
            found[name] = "alibi"
        elif str(value).lower() in ("rope", "rotary"):
            found[name] = "rope"
    return found


def check_keys(raw: Mapping[str, Any], config: ModelConfig, ignored: Collection[str] = ()) -> list[str]:
    """Raises ValueError for the first key, not in `ignored`, that makes the model compute something unsupported.

    `config` is made from the fields of `raw`. Returns a warning for each key that is not applied and might matter.
    """
    own = {*vars(config), *(name for names in SPELLINGS.values() for name in names)}
    warnings = []
    has_rope = config.position_embedding == "rope"
    only = _ONLY | (_ONLY_ROPE if has_rope else {})
    follows = _FOLLOWS | (_FOLLOWS_ROPE if has_rope else {})
    for key, value in raw.items():
        if key in own or key in ignored or key in _HARMLESS_NAMES or _HARMLESS_PATTERN.search(key):
            continue
        if not has_rope and (key in _ONLY_ROPE or key in _FOLLOWS_ROPE):
            continue
        if key in only:
            _refuse_unless(_is_legal(value, only[key]), key, value, "only " + " or ".join(map(as_json, only[key])))
        elif key in follows:
            legal = follows[key](config)
            _refuse_unless(_is_legal(value, (legal,)), key, value, f"only {as_json(legal)}, as other fields have it,")
        elif key in _ROPE_DICTS:
            _refuse_unless(not has_rope or _keeps_rope(value), key, value, "only the default RoPE")
        elif key in ("sliding_window", "use_sliding_window", "layer_types", "no_rope_layers", *_POSITION_KEYS):
            _check_special(raw, key, value, config)
        elif _DROPOUT.search(key):
            if not _is_legal(value, _OFF):
                warnings.append(f"{key} = {show(value)} is not applied: this library trains without dropout.")
        elif not is_empty(value):
            _refuse_unless(not _SUSPICIOUS.search(key), key, value, None)
            warnings.append(f"{key} = {show(value)} is not known and ignored.")
    return warnings


def _check_special(raw: Mapping[str, Any], key: str, value: Any, config: ModelConfig) -> None:
    if key == "sliding_window" and raw.get("use_sliding_window") in (None, True, 1):
        # A window as long as the context has no effect.
        is_wide = (read_number(value) or 0) >= config.model_max_length and raw.get("use_sliding_window") is None
        _refuse_unless(is_wide or _is_legal(value, _OFF), key, value, "only full attention")
    elif key == "use_sliding_window":
        _refuse_unless(_is_legal(value, _OFF), key, value, "only false")
    elif key == "layer_types":
        is_full = isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
        _refuse_unless(is_full or value is None, key, value, "only full_attention in each layer")
    elif key == "no_rope_layers":  # 1 for a layer that has RoPE
        is_whole = isinstance(value, list) and all(_is_legal(layer, _ONE) for layer in value)
        is_right = is_whole or value is None or config.position_embedding == "alibi"
        _refuse_unless(is_right, key, value, "only RoPE in each layer")
    elif key in _POSITION_KEYS and not _is_legal(value, _OFF):
        is_known = key in scheme_signs(raw)  # `hf_config.choose` uses it
        _refuse_unless(is_known, key, value, "only rope or alibi")


def _refuse_unless(ok: bool, key: str, value: Any, legal: str | None) -> None:
    if ok:
        return
    if legal is not None:
        raise ValueError(f"{key} = {show(value)} is not supported: {legal} is.")
    raise ValueError(
        f"{key} = {show(value)} is not known and, by its name, may change what the model computes; if it does not, "
        f"pass --ignore-key {key} to tools/convert.py (in Python: Reading(ignore_keys=({key!r},)))."
    )


def _keeps_rope(value: Any) -> bool:
    """Whether rope_parameters or rope_scaling mean the original rotation (its base is read elsewhere)."""
    if is_empty(value):
        return True
    if not isinstance(value, Mapping) or any(isinstance(entry, Mapping) for entry in value.values()):
        return False  # one rotation per layer type
    if not all(_is_legal(value.get(name), _ONE) for name in ("partial_rotary_factor", "mrope_section")):
        return False
    kinds = {str(value[name]).lower() for name in ("rope_type", "type") if value.get(name) is not None}
    if kinds == {"linear"}:
        return _is_legal(value.get("factor", 0), _ONE)
    # With the default type other entries have no effect; without a type they may belong to any.
    named = () if kinds else value.keys() - {"rope_theta", "base", "rope_type", "type"}
    return kinds <= {"default"} and all(_is_legal(value[name], _ONE) for name in named)


def is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_legal(value: Any, legal: tuple) -> bool:
    if value is None or value in ("", [], {}):
        return True
    if isinstance(value, str) and read_number(value) is None:
        return value.lower() in legal
    number = float(value) if isinstance(value, bool) else read_number(value)
    return number is not None and any(
        math.isclose(number, float(item), rel_tol=1e-5) for item in legal if not isinstance(item, str)
    )


def as_json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
