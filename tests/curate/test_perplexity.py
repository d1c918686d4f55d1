"""Bits a byte against the model's logits, one document at a time."""

from __future__ import annotations

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bc2_jax
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, table
from bc2_jax.convert.hf_write import write_folder
from bc2_jax.convert.source import source_of_params
from bc2_jax.convert.stream import Stream
from bc2_jax.curate.features import make_perplexity


@pytest.fixture(scope="module", params=["rope", "alibi"])
def folder(request, tokenizer, tmp_path_factory):
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, model_max_length=64,
        position_embedding=request.param, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = table.param_shapes(config)
    params = table.unflatten({name: rng.standard_normal(s).astype(np.float32) * 0.3 for name, s in shapes.items()})
    path = tmp_path_factory.mktemp("model") / "hf"
    write_folder(Stream(source_of_params(params, config), hf.DTYPES["float32"]), path, "float32")
    shutil.copy(tokenizer.path, path / "tokenizer.model")
    return path


def reference(model, tokenizer, text: str, max_tokens: int) -> float:
    ids = tokenizer.encode(text)[:max_tokens]
    padding = max_tokens - len(ids)
    logits = np.asarray(
        model(jnp.array([[0] * padding + ids]), segment_ids=jnp.array([[0] * padding + [1] * len(ids)]))
    )
    logits = logits[0, padding:].astype(np.float64)
    total = 0.0
    for t in range(1, len(ids)):
        row = logits[t - 1]
        total -= row[ids[t]] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total / math.log(2) / len(tokenizer.decode(ids[1:]).encode())


def test_bits_a_byte_are_those_of_the_models_logits(folder, tokenizer, modules):
    loaded = bc2_jax.load_pretrained(folder)
    model = jax.jit(lambda ids, segment_ids: loaded(ids, segment_ids=segment_ids))
    texts = [modules[0][:40], "two words", modules[1][:3000], "", "x", "é中", modules[2][:120], modules[3][:90]]
    found = make_perplexity(folder, max_tokens=24)(texts)
    assert found.dtype == np.float64 and found.shape == (8,)
    for text, value in zip(texts, found, strict=True):
        if len(tokenizer.encode(text)) < 2:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(reference(model, tokenizer, text, 24), rel=1e-4)
    assert np.isnan(found[3]) and np.isfinite(found).sum() >= 6


def test_bad_settings_are_named(folder):
    with pytest.raises(ValueError, match="max_tokens = 1 is not valid: "):
        make_perplexity(folder, max_tokens=1)
    with pytest.raises(FileNotFoundError):
        make_perplexity(folder / "missing")
