"""What the tool makes of config files of every kind; nothing is compiled."""

from __future__ import annotations

import pytest

from bc2_jax.config import MeshConfig
from bc2_jax.tpu.chips import parse_topology
from tools.aot_compile import load_config, make_parser, search

TOPOLOGY = parse_topology("v5p:2x2x1")


def load(name: str, *options: str):
    arguments = [f"configs/{name}.py", "--topology", "v5p:2x2x1", *options]
    args, overrides = make_parser().parse_known_args(arguments)
    return load_config(args, overrides, TOPOLOGY), args


def test_the_batch_of_rows_and_of_answers():
    assert load("baichuan2_13b_chat", "--batch-per-chip", "3")[0].data.global_batch_size == 12
    config, _ = load("baichuan2_13b_ppo", "--ppo.prompts-per-step", "32", "--lora.rank", "4")
    assert (config.ppo.prompts_per_step, config.lora.rank, config.mesh) == (32, 4, MeshConfig())
    assert load("baichuan2_13b_ppo", "--inference")[0].mesh == MeshConfig(data=1, fsdp=1, tensor=4)


def test_what_is_for_rows_alone():
    with pytest.raises(ValueError, match="--batch-per-chip is not for a RLConfig, whose own fields give the batch"):
        load("baichuan2_13b_ppo", "--batch-per-chip", "2")
    config, args = load("baichuan2_13b_ppo", "--search")
    with pytest.raises(ValueError, match="--search is for runs on packed rows, not for a RLConfig"):
        search(args, [], config, TOPOLOGY)
