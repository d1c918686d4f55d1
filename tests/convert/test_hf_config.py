"""config.json: what it says, what has to be inferred, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig
from bc2_jax.convert.hf_config import read_config, write_config


@st.composite
def configs(draw) -> ModelConfig:
    heads, vocab = draw(st.integers(1, 64)), draw(st.integers(1, 200_000))
    small = st.floats(1e-12, 1e6)
    return ModelConfig(
        hidden_size=heads * 2 * draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(1, 20_000)),
        num_hidden_layers=draw(st.integers(1, 100)),
        num_attention_heads=heads,
        position_embedding=draw(st.sampled_from(["rope", "alibi"])),
        vocab_size=vocab,
        model_max_length=draw(st.integers(1, 10**6)),
        rms_norm_eps=draw(small),
        initializer_range=draw(small),
        rope_theta=draw(small),
        normalize_head=draw(st.booleans()),
        z_loss_weight=draw(st.floats(0, 1)),
        **{f"{name}_token_id": draw(st.integers(0, vocab - 1)) for name in ("pad", "bos", "eos")},
    )


@given(configs())
@settings(max_examples=200, deadline=None)
def test_config_round_trip(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp()
    write_config(config, folder)
    assert read_config(folder) == config


def write_raw(folder: Path, without: tuple[str, ...] = (), **changes) -> Path:
    """config.json of the released 7B model, changed."""
    raw = {
        "architectures": ["BaichuanForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
        "model_type": "baichuan",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 125696,
    } | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in without}))
    return folder


SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40}


@pytest.mark.parametrize(
    ("without", "changes", "expected", "reason"),
    [
        ((), {"z_loss_weight": 0}, BAICHUAN2_7B, "max_position_embeddings = 4096 is present"),
        (("max_position_embeddings",), {}, BAICHUAN2_7B, "hidden_size = 4096"),
        (("max_position_embeddings",), SIZES_13B, BAICHUAN2_13B, "max_position_embeddings is absent"),
        ((), SIZES_13B | {"position_embedding": "alibi"}, BAICHUAN2_13B, None),
        (
            ("model_max_length",),
            {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000},
            dataclasses.replace(BAICHUAN2_7B, vocab_size=64000, normalize_head=False),
            "BaiChuanForCausalLM, so spelt, is Baichuan 1",
        ),
        (
            ("max_position_embeddings",),
            SIZES_13B | {"vocab_size": 64000},
            dataclasses.replace(BAICHUAN2_13B, vocab_size=64000, normalize_head=False),
            "vocab_size = 64000",
        ),
        (
            (),
            {"vocab_size": 64000, "normalize_head": True, "rope_theta": 5e5},
            dataclasses.replace(BAICHUAN2_7B, vocab_size=64000, rope_theta=5e5),
            None,
        ),
    ],
)
def test_released_configs(tmp_path, caplog, without, changes, expected, reason):
    with caplog.at_level(logging.INFO):
        config = read_config(write_raw(tmp_path, without, **changes))
    assert config == dataclasses.replace(expected, z_loss_weight=0.0)
    if reason is not None:
        assert reason in caplog.text
    if "position_embedding" in changes:
        assert "position_embedding" not in caplog.text


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        ((), {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ((), {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ((), {"model_type": "llama"}, "model_type = 'llama' is not supported"),
        (("model_type",), {}, "model_type = None is not supported"),
        ((), {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported"),
        ((), {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ((), {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ((), {"hidden_size": "4096"}, "hidden_size = '4096' is not valid: expected int"),
        ((), {"eos_token_id": [2]}, "expected int"),
        ((), {"num_attention_heads": 33}, "must divide hidden_size"),
        ((), {"position_embedding": "rotary"}, "legal values are rope, alibi"),
        (("vocab_size", "hidden_size"), {}, "has no hidden_size, vocab_size"),
    ],
)
def test_unsupported_configs(tmp_path, without, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        read_config(write_raw(tmp_path, without, **changes))


def test_missing_and_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)
