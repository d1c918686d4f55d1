"""Layers that change nothing: the logits of the deep model are those of the small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import bc2_jax
from bc2_jax.config import ModelConfig
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.demo.deepen import DEPTHS, deepen
from bc2_jax.tokenizer import Tokenizer
from tests.convert.models import random_params


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_the_logits_are_the_same(position: str, tokenizer: Tokenizer, tmp_path: Path):
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, position_embedding=position,
        vocab_size=tokenizer.vocab_size, model_max_length=64,
    )  # fmt: skip
    save_folder(random_params(config, np.float32), config, tmp_path / "a", "float32", tokenizer_path=tokenizer.path)
    deepen(tmp_path / "a", tmp_path / "b")
    small, deep = (bc2_jax.load_pretrained(tmp_path / name, dtype="float32") for name in "ab")
    assert deep.config.num_hidden_layers == DEPTHS[position]
    ids = np.arange(3, 23).reshape(2, 10)
    expected = np.asarray(small(ids))
    assert np.ptp(expected) > 0.1
    np.testing.assert_array_equal(np.asarray(deep(ids)), expected)


def test_a_deeper_model_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    config = ModelConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=41, num_attention_heads=2, position_embedding="alibi",
        vocab_size=tokenizer.vocab_size, model_max_length=64,
    )  # fmt: skip
    save_folder(random_params(config, np.float32), config, tmp_path / "a", "float32", tokenizer_path=tokenizer.path)
    with pytest.raises(ValueError, match="more than 40"):
        deepen(tmp_path / "a", tmp_path / "b")
