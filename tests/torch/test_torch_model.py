"""The PyTorch model that ours is checked against, itself checked against the golden numbers. Needs torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from bc2_jax.config import ModelConfig
from bc2_jax.convert.hf import open_folder
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.hf_write import write_folder
from bc2_jax.convert.parity import Outputs, compare
from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.convert.source import open_source
from bc2_jax.convert.stream import Stream
from bc2_jax.convert.torch_model import forward, to_tensor
from tests.convert.models import TINY, random_folder
from tests.programs import load_program

tool = load_program("check_parity")


def run_ours(folder: Path, input_ids: np.ndarray) -> Outputs:
    model = load_pretrained(folder)
    ids = jnp.asarray(input_ids)
    return Outputs(np.asarray(model(ids)), np.asarray(model.every_hidden_state(ids)))


def test_agrees_with_the_golden_numbers(golden):
    outputs = forward(golden.config, open_folder(golden.folder), golden.arrays["input_ids"])
    assert outputs.logits.dtype == outputs.hidden_states.dtype == np.float32
    np.testing.assert_allclose(outputs.hidden_states, golden.arrays["hidden_states"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(outputs.logits, golden.arrays["eval_logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("scheme", "heads", "dtype"),
    [("rope", 1, "float32"), ("rope", 3, "bfloat16"), ("alibi", 5, "float16"), ("alibi", 8, "bfloat16")],
)
def test_agrees_with_ours(tmp_path, scheme, heads, dtype):
    config = dataclasses.replace(
        TINY, hidden_size=8 * heads, num_attention_heads=heads, position_embedding=scheme, rope_theta=500.0
    )
    # Standard normal weights: the attention is sharp, so a wrong position or scale would show.
    folder = random_folder(tmp_path / "model", config, dtype)
    input_ids = np.random.default_rng(1).integers(config.vocab_size, size=(2, 21))
    result = compare(forward(config, open_folder(folder), input_ids), run_ours(folder, input_ids), 1e-4)
    assert result.holds, result


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_the_baichuan1_layout_needs_no_normhead(golden, tmp_path, file_format):
    """The export for engines that know Baichuan 1 gives Baichuan 2's logits, whoever computes them."""
    folder = tmp_path / "baichuan1"
    stream = Stream(open_source(golden.folder), np.dtype(np.float32), normalize_head=True)
    write_folder(stream, folder, "float32", "baichuan1", file_format, max_shard_bytes=50_000)
    config = read_config(folder)
    assert not config.normalize_head
    input_ids = golden.arrays["input_ids"]
    for outputs in (forward(config, open_folder(folder), input_ids), run_ours(folder, input_ids)):
        np.testing.assert_allclose(outputs.logits, golden.arrays["eval_logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_to_tensor_keeps_every_value(dtype):
    array = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)
    array.flags.writeable = False
    for view in (array, array.T):
        tensor = to_tensor(view)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), view.astype(np.float32))
        tensor.zero_()  # a copy: the file's memory is not touched
    assert array.astype(np.float32).any()


def test_head_in_blocks(golden, monkeypatch):
    whole = forward(golden.config, open_folder(golden.folder), golden.arrays["input_ids"][:, :4])
    monkeypatch.setattr("bc2_jax.convert.torch_model._HEAD_ROWS", 7)
    blocks = forward(golden.config, open_folder(golden.folder), golden.arrays["input_ids"][:, :4])
    np.testing.assert_allclose(blocks.logits, whole.logits, rtol=0, atol=1e-6)


def test_refuses_ids_outside_the_vocabulary(golden):
    for token_id in (-1, golden.config.vocab_size):
        with pytest.raises(ValueError, match=f"token id = {token_id} is not valid"):
            forward(golden.config, open_folder(golden.folder), np.array([[0, token_id]]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tool(golden, capsys, dtype):
    command = [str(golden.folder), "--torch", "--dtype", dtype, "--length", "40", "--batch", "3", "--seed", "7"]
    assert tool.main(command) == 0
    out = capsys.readouterr().out
    assert "against PyTorch on 3 x 40 tokens" in out and "Parity holds within" in out


def test_tool_sees_a_wrong_rope_theta(tmp_path, capsys, monkeypatch):
    """A config that is read otherwise here and there is the kind of error the tool is for."""
    folder = random_folder(tmp_path / "model", TINY)

    def forward_with_another_theta(config: ModelConfig, *rest) -> Outputs:
        return forward(dataclasses.replace(config, rope_theta=100.0), *rest)

    monkeypatch.setattr("bc2_jax.convert.torch_model.forward", forward_with_another_theta)
    assert tool.main([str(folder), "--torch"]) == 1
    assert "the first hidden state to differ is that of layer 0." in capsys.readouterr().out
