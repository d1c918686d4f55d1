from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from bc2_jax.config import (
    BAICHUAN2_7B,
    BAICHUAN2_13B,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    DistributedConfig,
    MeshConfig,
    MixtureStage,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    check_divisible,
    differing_fields,
)
from bc2_jax.model.baichuan import split_model
from bc2_jax.validation import divisors

# Paper section 2.5: hidden, ffn, layers, heads, and parameters without the two embeddings, in millions.
SCALING_LAW = (
    (384, 1152, 6, 6, 11.51), (704, 2112, 8, 8, 51.56), (832, 2496, 12, 8, 108.01), (1216, 3648, 16, 8, 307.60),
    (1792, 5376, 20, 14, 835.00), (2240, 6720, 24, 14, 1565.60), (2880, 8640, 28, 20, 3019.33),
)  # fmt: skip
TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "position_embedding": "rope",
}  # fmt: skip
UNREAD = SourceConfig(path="rare", weight=0.0)
DATA = {"sources": (SourceConfig(path="rows"),), "tokenizer": "tokenizer.model"}


def train_config(**changes) -> TrainConfig:
    defaults = {
        "name": "test", "num_steps": 10, "model": ModelConfig(**TINY),
        "data": DataConfig(**DATA, sequence_length=8, global_batch_size=16),
    }  # fmt: skip
    return TrainConfig(**(defaults | changes))


@pytest.mark.parametrize(
    ("config", "count"), [(BAICHUAN2_7B, 7_505_973_248), (BAICHUAN2_13B, 13_896_668_160)], ids=["7B", "13B"]
)
def test_parameter_counts(config: ModelConfig, count: int):
    assert config.num_parameters() == count
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(split_model(config, ComputeConfig())[1])) == count


@pytest.mark.parametrize(("hidden", "ffn", "layers", "heads", "millions"), SCALING_LAW)
def test_scaling_law_models(hidden: int, ffn: int, layers: int, heads: int, millions: float):
    config = ModelConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        position_embedding="rope",
    )  # fmt: skip
    non_embedding = config.num_parameters() - 2 * config.vocab_size * hidden
    assert round(non_embedding / 1e6, 2) == millions
    shapes = split_model(config)[1]
    assert non_embedding == sum(math.prod(x.shape) for x in jax.tree.leaves((shapes["layers"], shapes["norm"])))


@pytest.mark.parametrize(("config", "tera"), [(BAICHUAN2_7B, 185.0), (BAICHUAN2_13B, 346.3)], ids=["7B", "13B"])
def test_flops_per_sequence(config: ModelConfig, tera: float):
    assert round(config.flops_per_sequence(4096) / 1e12, 1) == tera


def test_flops_count_every_matmul_once():
    config = ModelConfig(**TINY)
    D, F, L, V, T = 16, 24, 2, 32, 5
    weights = L * (4 * D * D + 3 * D * F) + V * D
    pairs = T * (T + 1) // 2  # causal: query t meets t + 1 keys, in q.k and in p.v
    assert config.flops_per_sequence(T) == 3 * 2 * (weights * T + 2 * L * D * pairs)


MODEL_ERRORS = [
    ({"num_attention_heads": 5}, ("model.num_attention_heads = 5", "hidden_size = 16", "1, 2, 4, 8, 16")),
    ({"num_attention_heads": 16}, ("model.num_attention_heads = 16", "even head size")),
    ({"position_embedding": "learned"}, ("model.position_embedding = 'learned'", "rope, alibi")),
    ({"pad_token_id": 32}, ("model.pad_token_id = 32", "0..31")),
    ({"eos_token_id": -1}, ("model.eos_token_id = -1", "0..31")),
    ({"z_loss_weight": -1.0}, ("model.z_loss_weight = -1.0", "at least 0")),
    *(
        ({field: 0}, (f"model.{field} = 0", "positive"))
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                      "model_max_length", "rms_norm_eps", "initializer_range", "rope_theta")
    ),
]  # fmt: skip
TWO_PROCESSES = DistributedConfig(coordinator_address="host:1234", num_processes=2, process_id=1)
OTHER_ERRORS = [
    (ComputeConfig, {"loss_chunk": 0}, ("compute.loss_chunk = 0", "positive")),
    (ComputeConfig, {"attention_block": -1}, ("compute.attention_block = -1", "positive")),
    (ComputeConfig, {"dtype": "float16"}, ("compute.dtype = 'float16'", "float32, bfloat16")),
    (ComputeConfig, {"attention": "splash"}, ("compute.attention = 'splash'", "reference, chunked, flash")),
    (ComputeConfig, {"remat": "some"}, ("compute.remat = 'some'", "none, full, save_dots", "list of q, k, v,")),
    (ComputeConfig, {"remat": "q,k,q"}, ("compute.remat = 'q,k,q'", "each at most once")),
    (ComputeConfig, {"remat": ""}, ("compute.remat = ''", "none, full")),
    (MeshConfig, {"data": 0}, ("mesh.data = 0", "at least 1")),
    (MeshConfig, {"tensor": -1}, ("mesh.tensor = -1", "at least 1")),
    (MeshConfig, {"fsdp": 0}, ("mesh.fsdp = 0", "-1 for the rest")),
    (MeshConfig, {"num_cpu_devices": -1}, ("mesh.num_cpu_devices = -1", "at least 0")),
    (MeshConfig, {"context": 0}, ("mesh.context = 0", "at least 1")),
    (MeshConfig, {"fsdp_inner": 0}, ("mesh.fsdp_inner = 0", "at least 1, or -1")),
    (DistributedConfig, {"num_processes": 2}, ("distributed.coordinator_address = None", "all three or not at all")),
    (DistributedConfig, {"coordinator_address": "h:1", "num_processes": 2}, ("distributed.process_id = None", "three")),
    (DistributedConfig, {"coordinator_address": "h", "num_processes": 2, "process_id": 0},
     ("distributed.coordinator_address = 'h'", "HOST:PORT")),
    (DistributedConfig, {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
     ("distributed.process_id = 2", "0..1")),
    (DistributedConfig, {"heartbeat_timeout": 0}, ("distributed.heartbeat_timeout = 0", "positive")),
    (DistributedConfig, {"step_timeout": -1}, ("distributed.step_timeout = -1", "at least 0")),
    (OptimizerConfig, {"peak_learning_rate": 0.0}, ("optimizer.peak_learning_rate = 0.0", "positive")),
    (OptimizerConfig, {"clip_norm": 0.0}, ("optimizer.clip_norm = 0.0", "positive")),
    (OptimizerConfig, {"weight_decay": -0.1}, ("optimizer.weight_decay = -0.1", "at least 0")),
    (OptimizerConfig, {"b2": 1.0}, ("optimizer.b2 = 1.0", "[0, 1)")),
    (OptimizerConfig, {"min_learning_rate": 1.0}, ("optimizer.min_learning_rate = 1.0", "peak_learning_rate = 0.0002")),
    (OptimizerConfig, {"warmup_steps": 9, "decay_steps": 9}, ("optimizer.warmup_steps = 9", "decay_steps = 9")),
    (OptimizerConfig, {"moment_dtype": "int4"}, ("optimizer.moment_dtype = 'int4'", "float32, bfloat16, int8")),
    (OptimizerConfig, {"moment_dtype": "int8"}, ("optimizer.stochastic_rounding = False", "it must be True")),
    (OptimizerConfig, {"stochastic_rounding": True}, ("optimizer.stochastic_rounding = True", "it must be False")),
    (SourceConfig, {"path": "rows", "weight": -1.0}, ("data.sources.weight = -1.0", "at least 0")),
    (SourceConfig, {"path": "rows", "weight": math.inf}, ("data.sources.weight = inf", "it must be finite")),
    (SourceConfig, {"path": "rows", "quality_weights": (1.0, -1.0)}, ("quality_weights = (1.0, -1.0)", "at least 0")),
    (SourceConfig, {"path": "rows", "max_epochs": 0.0}, ("data.sources.max_epochs = 0.0", "positive", "None")),
    (MixtureStage, {"start_tokens": 0, "weights": (1.0,)}, ("data.stages.start_tokens = 0", "positive")),
    (MixtureStage, {"start_tokens": 1, "weights": (0.0,)}, ("data.stages.weights = (0.0,)", "one positive")),
    (DataConfig, DATA | {"sources": (UNREAD,)}, ("data.sources.weight = 0.0", "begin with a source")),
    (DataConfig, DATA | {"sources": (*DATA["sources"], UNREAD)}, ("weight = 0.0", "no stage reads 'rare'")),
    (DataConfig, DATA | {"stages": (MixtureStage(start_tokens=10**7, weights=(1.0, 1.0)),)},
     ("data.stages.weights = (1.0, 1.0)", "each of the 1 data.sources")),
    (DataConfig, DATA | {"stages": (MixtureStage(start_tokens=5 * 2**22, weights=(1.0,)),) * 2},
     ("data.stages.start_tokens = 20971520", "at least a row, 4096 tokens, after")),
    (DataConfig, DATA | {"sources": ()}, ("data.sources = ()", "at least one")),
    (DataConfig, DATA | {"sequence_length": 0}, ("data.sequence_length = 0", "positive")),
    (DataConfig, DATA | {"global_batch_size": 10, "accumulation_steps": 4},
     ("data.accumulation_steps = 4", "data.global_batch_size = 10", "1, 2, 5, 10")),
    (CheckpointConfig, {"save_every": 0}, ("checkpoint.save_every = 0", "positive")),
    (CheckpointConfig, {"keep_every_tokens": -1}, ("checkpoint.keep_every_tokens = -1", "at least 0")),
    (CheckpointConfig, {"save_every": 10, "keep_every": 15}, ("checkpoint.keep_every = 15", "save_every = 10")),
]  # fmt: skip
RUN_ERRORS = [
    ({"num_steps": 0}, ("num_steps = 0", "positive")),
    ({"seed": -1}, ("seed = -1", "at least 0")),
    ({"resume": "always"}, ("resume = 'always'", "never, auto")),
    ({"checkpoint": CheckpointConfig(keep_every_tokens=1)}, ("checkpoint.keep_every_tokens = 1", "at least a step")),
    ({"verify_resume_steps": 10}, ("verify_resume_steps = 10", "num_steps = 10")),
    ({"data": DataConfig(**DATA, global_batch_size=16)}, ("data.sequence_length = 4096", "model_max_length = 64")),
    ({"mesh": MeshConfig(tensor=8)}, ("mesh.tensor = 8", "model.num_attention_heads = 4", "1, 2, 4.")),
    ({"mesh": MeshConfig(fsdp=3)}, ("mesh.fsdp = 3", "model.hidden_size = 16", "1, 2, 4, 8, 16")),
    ({"mesh": MeshConfig(num_cpu_devices=8, tensor=3)}, ("mesh.tensor = 3", "1, 2, 4, 8")),
    ({"mesh": MeshConfig(num_cpu_devices=8, data=4, context=4)}, ("mesh.data * mesh.context = 16", "1, 2, 4, 8")),
    ({"mesh": MeshConfig(num_cpu_devices=8, fsdp=3, data=2)}, ("mesh.fsdp = 3", "fsdp = 4")),
    ({"mesh": MeshConfig(num_cpu_devices=2, fsdp=8), "distributed": TWO_PROCESSES}, ("mesh.fsdp = 8", "fsdp = 4")),
    ({"mesh": MeshConfig(fsdp=-1, tensor=8, num_cpu_devices=8)}, ("mesh.tensor = 8", "1, 2, 4.")),
    ({"mesh": MeshConfig(fsdp=4, fsdp_inner=8)}, ("mesh.fsdp * mesh.fsdp_inner = 32", "model.hidden_size = 16")),
    ({"mesh": MeshConfig(context=4, tensor=2)}, ("mesh.context * mesh.tensor = 8", "model.num_attention_heads = 4")),
    ({"mesh": MeshConfig(context=4), "data": DataConfig(**DATA, sequence_length=6, global_batch_size=16)},
     ("mesh.context = 4", "data.sequence_length = 6", "1, 2, 3, 6")),
    ({"mesh": MeshConfig(data=3, fsdp=1)}, ("data.global_batch_size = 16", "= 3")),
    ({"mesh": MeshConfig(data=4, fsdp=2),
      "data": DataConfig(**DATA, sequence_length=8, global_batch_size=24, accumulation_steps=2)},
     ("data.global_batch_size = 24", "mesh.data * mesh.fsdp * data.accumulation_steps = 16")),
]  # fmt: skip


def assert_refused(make, fragments: tuple[str, ...]):
    with pytest.raises(ValueError) as error:
        make()
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value), "one sentence"


@pytest.mark.parametrize(("changes", "fragments"), MODEL_ERRORS)
def test_model_errors_name_field_value_and_legal_values(changes: dict, fragments: tuple[str, ...]):
    assert_refused(lambda: ModelConfig(**(TINY | changes)), fragments)


@pytest.mark.parametrize(("cls", "fields", "fragments"), OTHER_ERRORS)
def test_errors_name_field_value_and_legal_values(cls: type, fields: dict, fragments: tuple[str, ...]):
    assert_refused(lambda: cls(**fields), fragments)


@pytest.mark.parametrize(("changes", "fragments"), RUN_ERRORS)
def test_run_errors_name_field_value_and_legal_values(changes: dict, fragments: tuple[str, ...]):
    model = ModelConfig(**TINY, model_max_length=64)
    assert_refused(lambda: train_config(**({"model": model} | changes)), fragments)


def test_40_heads_cannot_be_cut_in_16():
    fragments = ("mesh.tensor = 16", "model.num_attention_heads = 40", "legal values are 1, 2, 4, 8.")
    assert_refused(lambda: check_divisible(BAICHUAN2_13B, MeshConfig(tensor=16)), fragments)
    for tensor in (1, 2, 4, 8):
        check_divisible(BAICHUAN2_13B, MeshConfig(tensor=tensor))


def test_listed_legal_values_are_legal():
    for value in divisors(math.gcd(BAICHUAN2_7B.num_attention_heads, 11008, 125696)):
        check_divisible(BAICHUAN2_7B, MeshConfig(tensor=value))


def test_mesh_takes_the_devices_that_remain():
    assert MeshConfig(data=2, tensor=2).resolve(16) == MeshConfig(data=2, fsdp=4, tensor=2)
    assert MeshConfig().resolve(1) == MeshConfig(fsdp=1)
    assert_refused(lambda: MeshConfig(data=2, fsdp=2).resolve(8), ("mesh.fsdp = 2", "8 devices", "fsdp = 4"))


def test_a_run_is_checked_again_when_its_mesh_is_known():
    config = train_config()
    assert config.resolve(8).mesh.fsdp == 8
    assert_refused(lambda: config.resolve(32), ("mesh.fsdp = 32", "model.hidden_size = 16"))
    small = train_config(data=DataConfig(**DATA, sequence_length=8, global_batch_size=4))
    assert_refused(lambda: small.resolve(8), ("data.global_batch_size = 4", "= 8"))


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BAICHUAN2_7B.hidden_size = 1
    with pytest.raises(TypeError):
        MeshConfig(2)


def test_differing_fields():
    a = train_config()
    b = dataclasses.replace(a, seed=1, model=dataclasses.replace(a.model, vocab_size=64))
    assert differing_fields(a, a) == []
    assert differing_fields(a, b) == ["model.vocab_size: 32 against 64", "seed: 0 against 1"]


def test_a_stage_begins_at_a_whole_row_whatever_the_batch():
    stages = tuple(MixtureStage(start_tokens=tokens, weights=(0.0, 1.0)) for tokens in (1, 129, 384))
    sources = (SourceConfig(path="rows"), SourceConfig(path="more", weight=0.0))
    for size in (1, 16):
        data = DataConfig(sources=sources, tokenizer="t", sequence_length=8, global_batch_size=size, stages=stages)
        assert data.tokens_per_step == 8 * size and data.stage_rows == (1, 17, 48)
