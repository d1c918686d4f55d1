"""What the tool makes of config files of every kind; nothing is compiled."""

from __future__ import annotations

import pytest

from bc2_jax.aot import compilation
from bc2_jax.cli.aot_compile import (
    check_options,
    compile_and_report,
    compile_and_report_scoring,
    compile_and_report_serving,
    load_config,
    make_parser,
    read_given_rates,
    search,
)
from bc2_jax.config import MeshConfig
from bc2_jax.tpu.chips import parse_topology

TOPOLOGY = parse_topology("v5p:2x2x1")


def load(name: str, *options: str):
    arguments = [f"configs/{name}.py", "--topology", "v5p:2x2x1", *options]
    args, overrides = make_parser().parse_known_args(arguments)
    return load_config(args, overrides, TOPOLOGY), args


def test_the_batch_of_rows_and_of_answers():
    assert load("baichuan2_13b_chat", "--batch-per-chip", "3")[0].data.global_batch_size == 12
    config, _ = load("baichuan2_13b_ppo", "--ppo.prompts-per-step", "32", "--lora.rank", "4")
    assert (config.ppo.prompts_per_step, config.lora.rank, config.mesh) == (32, 4, MeshConfig())
    assert load("baichuan2_13b_ppo", "--serve")[0].mesh == MeshConfig(data=1, fsdp=1, tensor=4)


def test_what_is_for_rows_alone():
    with pytest.raises(ValueError, match="--batch-per-chip is not for a RLConfig, whose own fields give the batch"):
        load("baichuan2_13b_ppo", "--batch-per-chip", "2")
    config, args = load("baichuan2_13b_ppo", "--search")
    with pytest.raises(ValueError, match="--search is for runs on packed rows, not for a RLConfig"):
        search(args, [], config, TOPOLOGY)


def test_scoring_is_on_the_mesh_of_serving_and_refuses_before_it_compiles(monkeypatch):
    monkeypatch.setattr(compilation, "use_topologies", lambda: pytest.fail("it compiles"))
    for options, message in (
        (("--row-length", "500"), "C-Eval test: shots of 450 tokens and a question of 80 do not fit a row of 500"),
        (("--benchmark", "mine:10:1:4090:9"), "mine: shots of 4090 tokens .* do not fit a row of 4096"),
        (("--benchmark", "mine:10"), "benchmark 'mine:10' is not valid: write NAME:ITEMS"),
    ):
        config, args = load("baichuan2_13b", "--score", *options)
        assert config.mesh == MeshConfig(data=1, fsdp=1, tensor=4)
        with pytest.raises(ValueError, match=message):
            compile_and_report_scoring(args, config, TOPOLOGY)


@pytest.mark.parametrize("kind", [(), ("--serve",), ("--score",), ("--search",)])
def test_a_report_of_another_chip_is_refused_before_it_compiles(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(compilation, "use_topologies", lambda: pytest.fail("it compiles"))
    path = tmp_path / "report.json"
    path.write_text('{"device": "v5e", "rates": {"matmul_share": 0.9}}')
    config, args = load("baichuan2_13b", "--calibrate", str(path), *kind)
    programs = {"--serve": compile_and_report_serving, "--score": compile_and_report_scoring}
    with pytest.raises(ValueError, match="device = 'v5e' is not valid: its rates are for another chip than v5p"):
        if kind == ("--search",):
            search(args, [], config, TOPOLOGY)
        else:
            programs.get("".join(kind), compile_and_report)(args, config, TOPOLOGY)
    path.write_text('{"device": "v5p", "rates": {"matmul_share": 0.9}}')
    assert read_given_rates(args, TOPOLOGY).matmul_share == 0.9
    assert read_given_rates(load("baichuan2_13b")[1], TOPOLOGY).measured == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--score", "--serve"), "--serve and --score compile different programs"),
        (("--score", "--search"), "--search is an option of training: leave it out with --score"),
        (("--row-length", "9"), "--row-length is an option of scoring: give --score as well"),
        (("--serve", "--benchmark", "a:1:1:1:1"), "--benchmark is an option of scoring"),
        (("--score", "--slot-length", "9"), "--slot-length is an option of serving: give --serve as well"),
    ],
)
def test_options_of_different_programs_are_not_mixed(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(load("baichuan2_13b", *options)[1])
    check_options(load("baichuan2_13b", "--score", "--batch", "2")[1])
    check_options(load("baichuan2_13b", "--serve", "--slots", "8", "--kv", "int8")[1])
