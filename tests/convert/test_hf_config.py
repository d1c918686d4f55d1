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
from bc2_jax.convert.hf_config import read_config, read_generation_config, write_config
from bc2_jax.convert.reading import Reading


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
        ((), {"model_type": "mistral"}, "model_type = 'mistral' is not supported: only baichuan and llama"),
        (("model_type",), {}, "model_type = None is not supported"),
        ((), {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported"),
        ((), {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ((), {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ((), {"hidden_size": "4k"}, "hidden_size = '4k' is not valid: expected int"),
        ((), {"vocab_size": 125696.5}, "vocab_size = 125696.5 is not valid: expected int"),
        ((), {"vocab_size": True}, "vocab_size = True is not valid: expected int"),
        ((), {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not valid: expected float"),
        ((), {"rope_theta": float("inf")}, "rope_theta = inf is not valid: expected float"),
        ((), {"hidden_size": 10**12}, "hidden_size = 1000000000000 is not valid: it must be at most"),
        ((), {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is not valid: it must be at most"),
        ((), {"max_position_embeddings": "long"}, "max_position_embeddings = 'long' is not valid: expected int"),
        ((), {"vocab_size": -5}, "vocab_size = -5 is not valid: it must be positive"),
        ((), {"eos_token_id": ["a"]}, "eos_token_id = 'a' is not valid: expected int"),
        ((), {"eos_token_id": [125696]}, "eos_token_id = 125696 is not valid: it must be in 0"),
        ((), {"architectures": ["BaiChuanForCausalLM"]}, "normalize_head is not clear: .*BaiChuan.* Baichuan 2"),
        ((), {"num_attention_heads": 33}, "must divide hidden_size"),
        ((), {"position_embedding": "rotary"}, "legal values are rope, alibi"),
        (("vocab_size", "hidden_size"), {}, "has no hidden_size, vocab_size"),
    ],
)
def test_unsupported_configs(tmp_path, without, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        read_config(write_raw(tmp_path, without, **changes))


SIGNS = [
    ({"hidden_size": 5120, "num_attention_heads": 40}, ()),
    ({"num_hidden_layers": 40}, ()),
    ({"hidden_size": 640, "num_attention_heads": 40}, ()),
    ({"hidden_size": 960, "num_attention_heads": 12}, ()),
    ({"alibi": True}, ()),
    ({"position_embedding_type": "alibi"}, ()),
    ({"hidden_size": 2048}, ("max_position_embeddings",)),
    ({"num_hidden_layers": 40}, ("max_position_embeddings",)),
    (SIZES_13B, ()),
    (SIZES_13B | {"num_hidden_layers": 32}, ("max_position_embeddings",)),
    (SIZES_13B | {"rope_theta": 5e5}, ("max_position_embeddings",)),
    (SIZES_13B | {"rope_scaling": {"type": "linear", "factor": 2}}, ("max_position_embeddings",)),
    (SIZES_13B | {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000}, ("max_position_embeddings",)),
]


@pytest.mark.parametrize(("changes", "without"), SIGNS)
def test_signs_of_the_position_scheme_that_disagree(tmp_path, changes, without):
    """Each folder has one sign of each scheme at least; who reads it, or its own key, decides."""
    folder = write_raw(tmp_path, without, **changes)
    with pytest.raises(ValueError, match="position_embedding is not clear: .* --position-embedding rope.alibi"):
        read_config(folder)
    if "rope_scaling" in changes:
        assert read_config(folder, Reading(position_embedding="alibi")).position_embedding == "alibi"
        return
    for scheme in ("rope", "alibi"):
        assert read_config(folder, Reading(position_embedding=scheme)).position_embedding == scheme
        write_raw(folder, without, **changes, position_embedding=scheme)
        assert read_config(folder).position_embedding == scheme
        write_raw(folder, without, **changes)


@pytest.mark.parametrize("length", [None, 0, -1])
def test_a_length_that_is_none_is_no_sign_of_rope(tmp_path, length):
    assert read_config(write_raw(tmp_path, **SIZES_13B, max_position_embeddings=length)).position_embedding == "alibi"


@pytest.mark.parametrize("vocab", [64_000, 64_003, 64_256])
def test_baichuan1_with_some_more_tokens(tmp_path, vocab):
    """Baichuan-13B is spelt as Baichuan 2 is; only its vocabulary tells that its head is plain."""
    folder = write_raw(tmp_path, ("max_position_embeddings",), **SIZES_13B, vocab_size=vocab)
    assert not read_config(folder).normalize_head
    assert read_config(folder, Reading(normalize_head=True)).normalize_head


@pytest.mark.parametrize(
    ("config_ids", "settings", "expected"),
    [
        (2, None, None),
        ([2], None, None),
        ([2, 195], None, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 195]}),
        ([2, 195], {"top_k": 5}, {"top_k": 5, "eos_token_id": [2, 195]}),
        ([2, 195], {"eos_token_id": 2}, {"eos_token_id": [2, 195]}),
        ([2, 195], {"eos_token_id": [7, 195]}, {"eos_token_id": [7, 195, 2]}),
        (2, {"eos_token_id": [2, 7]}, {"eos_token_id": [2, 7]}),
    ],
)
def test_several_ids_that_end_an_answer_are_kept(tmp_path, config_ids, settings, expected):
    write_raw(tmp_path, eos_token_id=config_ids)
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_generation_config(tmp_path) == expected


def test_missing_and_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)
