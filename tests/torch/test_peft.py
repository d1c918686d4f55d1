"""PEFT reads the adapters that we write and gives our logits, and the other way round."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import bc2_jax
from bc2_jax.align.lora import Adapter, load_peft, save_peft
from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.convert.conversion import to_hf
from bc2_jax.convert.pretrained import save_params
from bc2_jax.model.baichuan import init_params
from bc2_jax.model.lora import abstract_adapter
from tests.meshes import one_device_mesh

CONFIG = ModelConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, position_embedding="rope",
    vocab_size=48, initializer_range=0.2,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 48, (2, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in the layout of LLaMA."""
    root = tmp_path_factory.mktemp("base")
    save_params(init_params(CONFIG, 0, one_device_mesh()), CONFIG, root / "ours")
    to_hf(root / "ours", root / "llama", layout="llama")
    return root / "llama"


def ours(base: Path, adapter: Path) -> np.ndarray:
    return np.asarray(bc2_jax.load_pretrained(base, adapter=adapter)(IDS))


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=7, rslora=True),
        LoraConfig(rank=2, alpha=5, targets=("q_proj", "k_proj", "v_proj", "down_proj"), dora=True),
        LoraConfig(rank=4, targets=("v_proj", "up_proj"), ranks=(4, 2), alphas=(6.5, 3)),
        LoraConfig(rank=1, alpha=32, targets=("W_pack",), dropout=0.1),
    ],
    ids=["rslora", "dora", "ranks", "W_pack"],
)
def test_peft_reads_what_we_write(base: Path, tmp_path, config: LoraConfig):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32),
                          abstract_adapter(config, CONFIG, None))  # fmt: skip
    save_peft(tmp_path / "a", Adapter(config, params), CONFIG, base=base)
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a").eval()
    with model.disable_adapter():
        assert np.abs(theirs(model) - ours(base, tmp_path / "a")).max() > 0.1
    np.testing.assert_allclose(ours(base, tmp_path / "a"), theirs(model), atol=5e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_we_read_what_peft_writes(base: Path, tmp_path, dora: bool):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "gate_proj"], rank_pattern={"o_proj": 2}, use_dora=dora,
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "a")
    read = load_peft(tmp_path / "a", CONFIG).config
    assert {target: read.rank_of(target) for target in read.targets} == {"q_proj": 4, "o_proj": 2, "gate_proj": 4}
    np.testing.assert_allclose(ours(base, tmp_path / "a"), theirs(model), atol=5e-5)
