"""Keys of config.json: what changes the computation is honoured or refused, what does not is not refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.reading import Reading
from tests.convert.test_hf_config import SIZES_13B, write_raw

HONOURED = [
    ({"rope_theta": 1e6}, {"rope_theta": 1e6}),
    ({"rope_theta": 1_000_000}, {"rope_theta": 1e6}),
    ({"rotary_emb_base": 5e5}, {"rope_theta": 5e5}),
    ({"rope_parameters": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
    ({"rope_parameters": {"rope_theta": "1e6", "rope_type": "default"}}, {"rope_theta": 1e6}),
    ({"rope_scaling": {"rope_theta": 500000, "type": "default"}}, {"rope_theta": 5e5}),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}, {"rope_theta": 1e6}),
    ({"rms_norm_eps": "1e-05"}, {"rms_norm_eps": 1e-5}),
    ({"rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
    ({"model_max_length": 2048.0}, {"model_max_length": 2048}),
    ({"model_max_length": None, "max_position_embeddings": 2048.0}, {"model_max_length": 2048}),
    ({"eos_token_id": [7, 2, 195]}, {"eos_token_id": 7}),
    ({"eos_token_id": [7]}, {"eos_token_id": 7}),
    ({"bos_token_id": "3"}, {"bos_token_id": 3}),
]
HARMLESS = [
    {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_scaling": {"factor": 1}},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default", "factor": 4.0}}, {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"pad_token_id": None}, {"pad_token_id": -1}, {"eos_token_id": None}, {"eos_token_id": []},
    {"vocab_size": 125696.0}, {"hidden_size": "4096"}, {"initializer_range": "0.02"}, {"num_attention_heads": 32.0},
    {"head_dim": 128}, {"head_dim": 128.0}, {"num_key_value_heads": 32}, {"num_key_value_heads": None},
    {"hidden_act": "swish"}, {"attention_bias": False}, {"mlp_bias": None}, {"pretraining_tp": 2},
    {"tie_word_embeddings": None}, {"quantization_config": None}, {"quantization_config": {}},
    {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 28}, {"sliding_window": None},
    {"sliding_window": 4096}, {"layer_types": ["full_attention"] * 32}, {"no_rope_layers": [1] * 32},
    {"rope_ratio": 1}, {"partial_rotary_factor": 1.0}, {"rotary_pct": 1}, {"rotary_emb_base": 10000},
    {"final_logit_softcapping": None, "attn_logit_softcapping": 0}, {"residual_multiplier": 1.0},
    {"attention_multiplier": 128**-0.5}, {"query_pre_attn_scalar": 128}, {"use_qk_norm": False}, {"num_experts": 0},
    {"alibi": False}, {"position_embedding_type": "rope"}, {"norm_type": "RMSNorm"},
    {"dtype": "bfloat16", "transformers_version": "5.1.0", "_attn_implementation": "sdpa"},
    {"use_flash_attn": True, "_flash_attn_2_enabled": True, "attn_implementation": "eager"},
    {"gradient_checkpointing": True, "id2label": {"0": "a"}},
    {"temperature": 0.3, "repetition_penalty": 1.1, "max_length": 20, "bad_words_ids": [[3]]},
    {"auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "/x", "torchscript": False, "return_dict": True},
    {"some_future_scale": None, "attn_of_the_future": False, "extra_layers": []},
]  # fmt: skip
REFUSED = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, {"rope_parameters": {"rope_type": 3}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, {"rope_scaling": {"type": "longrope"}},
    {"rope_scaling": {"type": "linear", "factor": 1, "partial_rotary_factor": 0.5}},
    {"rope_scaling": "linear"}, {"rope_scaling": {"factor": 4.0}}, {"rope_scaling": {"alpha": 1000}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5},
    {"rotary_pct": 0.25}, {"rope_ratio": 16}, {"rotary_dim": 64}, {"rope_interleaved": True},
    {"no_rope_layers": [1] * 31 + [0]}, {"use_sliding_window": True, "sliding_window": 512}, {"sliding_window": 512},
    {"use_sliding_window": True}, {"layer_types": ["sliding_attention"] * 32}, {"layer_types": "full_attention"},
    {"head_dim": 64}, {"num_key_value_heads": 8}, {"num_kv_heads": 8}, {"multi_query": True},
    {"attention_bias": True}, {"mlp_bias": True}, {"use_bias": True}, {"hidden_act": "gelu"}, {"hidden_act": 1},
    {"tie_word_embeddings": True}, {"quantization_config": {"bits": 4}}, {"final_logit_softcapping": 30.0},
    {"attn_logit_softcapping": 50.0}, {"residual_multiplier": 0.22}, {"embedding_multiplier": 12.0},
    {"logits_scaling": 8.0}, {"attention_multiplier": 0.0078125}, {"query_pre_attn_scalar": 256}, {"scale_depth": 1.4},
    {"use_qk_norm": True}, {"qk_layernorm": True}, {"num_local_experts": 8}, {"use_parallel_residual": True},
    {"layer_norm_eps": 1e-5}, {"norm_type": "layernorm"}, {"is_causal": False}, {"pruned_heads": {"1": [2]}},
    {"is_encoder_decoder": True}, {"position_embedding_type": "absolute"}, {"n_layer": 30},
    {"attn_of_the_future": 2}, {"some_future_scale": 0.5}, {"rope_of_the_future": {"a": 1}},
]  # fmt: skip


def read(folder, **changes):
    return read_config(write_raw(folder, z_loss_weight=BAICHUAN2_7B.z_loss_weight, **changes))


@pytest.mark.parametrize(("changes", "fields"), HONOURED, ids=lambda value: json.dumps(value))
def test_honoured(tmp_path, changes, fields):
    assert read(tmp_path, **changes) == dataclasses.replace(BAICHUAN2_7B, **fields)


@pytest.mark.parametrize("changes", HARMLESS, ids=json.dumps)
def test_harmless(tmp_path, caplog, changes):
    assert read(tmp_path, **changes) == BAICHUAN2_7B
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("changes", REFUSED, ids=json.dumps)
def test_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read(tmp_path, **changes)
    assert any(f"{key} = " in str(error.value) for key in changes)


def test_unknown_keys_are_named(tmp_path, caplog):
    assert read(tmp_path, corpus="pile", attention_dropout=0.1, hidden_dropout=0.0) == BAICHUAN2_7B
    assert "corpus = 'pile' is not known and ignored" in caplog.text
    assert "attention_dropout = 0.1 is not applied" in caplog.text and "hidden_dropout" not in caplog.text
    with pytest.raises(ValueError, match="gate_temper = 3 is not known .* pass --ignore-key gate_temper"):
        read(tmp_path, gate_temper=3)
    folder = write_raw(tmp_path, gate_temper=3, rope_ratio=1)
    assert read_config(folder, Reading(ignore_keys=("gate_temper",))).hidden_size == 4096


def test_settings_of_rope_mean_nothing_to_alibi(tmp_path):
    rope = {"rope_scaling": {"type": "yarn"}, "rotary_pct": 0.5, "rope_theta": 1e5, "rotary_dim": 64}
    config = read(tmp_path, **SIZES_13B, position_embedding="alibi", **rope)
    assert config.position_embedding == "alibi"


@given(
    st.lists(st.sampled_from(["rope_theta", "rotary_emb_base", "rope_parameters", "rope_scaling"]), unique=True),
    st.floats(1, 1e8),
    st.sampled_from([1.0, 1.5]),
)
def test_every_spelling_of_theta_counts_and_two_must_agree(tmp_path_factory, keys, theta, factor):
    """Whatever the order: the last of several contradicts the others, unless factor is 1."""
    folder = tmp_path_factory.mktemp("theta")
    values = {key: theta for key in keys}
    if len(keys) > 1:
        values[keys[-1]] = theta * factor
    raw = {key: {"rope_theta": value} if key.startswith("rope_p") or key.startswith("rope_s") else value
           for key, value in values.items()}  # fmt: skip
    if len(keys) > 1 and factor != 1:
        with pytest.raises(ValueError, match=" contradicts "):
            read(folder, **raw)
    else:
        assert math.isclose(read(folder, **raw).rope_theta, theta if keys else 1e4)
