"""LlamaForSequenceClassification of `transformers` gives the rewards that we give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from orbax.checkpoint import v1 as ocp
from transformers import LlamaForSequenceClassification

from bc2_jax.align.scoring import Scorer
from bc2_jax.checkpoint import save_context
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.reward_export import export_reward_model
from bc2_jax.model.reward import backbone_of
from tests.convert.models import GOLDEN, read_params

REWARD = dict(np.load(GOLDEN / "align" / "reward.npz"))


def test_rewards_are_those_of_transformers(tmp_path: Path):
    config = read_config(GOLDEN / "rope-tiny")
    params = backbone_of(read_params(GOLDEN / "rope-tiny", config)) | {"score": {"weight": REWARD["score_weight"]}}
    metadata = {"config": {"model": dataclasses.asdict(config), "reward": {}}}
    with save_context():
        ocp.save_checkpointables(tmp_path / "rm", {"params": params}, custom_metadata=metadata)
    export_reward_model(tmp_path / "rm", tmp_path / "hf", dtype="float32")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert model.config.num_labels == 1
    ids, mask = REWARD["chosen/input_ids"], REWARD["chosen/attention_mask"]
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits[:, 0].numpy()
    ours = Scorer.load(tmp_path / "rm").score([row[:n] for row, n in zip(ids, mask.sum(1), strict=True)])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(theirs, REWARD["chosen/rewards"], atol=2e-5)
