"""TRL's DPO on the same tiny models, in the layout of LLaMA: its losses and gradients are ours, on packed pairs."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bc2_jax.convert.conversion import to_hf
from tests.align.test_dpo import BATCH, DPO, MODEL, POLICY, loss_and_gradients, with_
from tests.convert.models import GOLDEN

NAMES = {"sigmoid": "sigmoid", "hinge": "hinge", "robust": "robust", "ipo_mean": "ipo", "sigmoid_norm": "sigmoid_norm"}
"""What TRL calls our losses."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Policy and reference."""
    root = tmp_path_factory.mktemp("llama")
    for name, source in (("policy", GOLDEN / "align" / "policy"), ("reference", GOLDEN / "rope-tiny")):
        to_hf(source, root / name, layout="llama", dtype="float32")
    return [root / "policy", root / "reference"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """What a trainer asks for; the pairs here are ids already."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(320)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def trl_inputs() -> dict[str, torch.Tensor]:
    """Chosen answers, then rejected ones, each behind its own copy of the prompt."""
    inputs = {
        name: np.concatenate([DPO[f"{answer}/{name}"] for answer in ("chosen", "rejected")])
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    return {name: torch.from_numpy(x.astype(np.int64)) for name, x in inputs.items()}


@pytest.mark.parametrize("loss", list(NAMES))
def test_losses_and_gradients_are_those_of_trl(loss, folders, tokenizer, tmp_path):
    smoothing = 0.1 if loss == "robust" else 0.0
    trainer = trl.DPOTrainer(
        *(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), loss_type=[NAMES[loss]], beta=0.1, label_smoothing=smoothing, use_cpu=True,
            report_to="none", gradient_checkpointing=False, bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trl_inputs())
    theirs.backward()
    expected = {name: x.grad.numpy() for name, x in trainer.model.named_parameters()}

    metrics, gradients = loss_and_gradients(with_(loss=loss, label_smoothing=smoothing), BATCH)
    assert metrics["loss"] == pytest.approx(theirs.item(), rel=1e-5)
    largest = max(np.abs(x).max() for x in expected.values())
    ours = {"model.embed_tokens.weight": gradients["embed_tokens"]["weight"]}
    ours["model.norm.weight"] = gradients["norm"]["weight"]
    for layer in range(MODEL.num_hidden_layers):
        for module in ("mlp", "self_attn"):
            for name, leaf in gradients["layers"][module].items():
                x = leaf["weight"][layer]  # of attention [D, N, H], of o_proj [N, H, D]
                flat = x.reshape(-1, x.shape[-1]) if name == "o_proj" else x.reshape(x.shape[0], -1)
                ours[f"model.layers.{layer}.{module}.{name}.weight"] = flat.T
    for name, x in ours.items():
        np.testing.assert_allclose(x, expected[name], atol=1e-5 * largest, rtol=1e-5, err_msg=name)
    # NormHead is in their head's weight: what is left of its gradient goes along the rows' lengths.
    rows = np.asarray(POLICY["lm_head"]["weight"])
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / lengths
    head = expected["lm_head.weight"]
    head = (head - unit * np.sum(head * unit, axis=-1, keepdims=True)) / lengths
    np.testing.assert_allclose(gradients["lm_head"]["weight"], head, atol=1e-5 * np.abs(head).max(), rtol=1e-5)
