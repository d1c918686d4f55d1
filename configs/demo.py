"""A small Baichuan 2 on real Chinese, English and Python text, on a laptop.

python train.py                     # about 4 minutes on 2 cores; no accelerator
"""

import dataclasses
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from bc2_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)

# What prepare() puts the text's real places for.
PREPARED = "prepared by configs/demo.py"
# About the share of rows each has, so that the sources end together.
WEIGHTS = {"zh": 5, "en": 1, "code": 7}


def config() -> TrainConfig:
    return TrainConfig(
        name="demo",
        model=ModelConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
            position_embedding="alibi", vocab_size=4096, model_max_length=512, initializer_range=0.04,
        ),
        # prepare() fetches and packs the text and names the real paths.
        data=DataConfig(
            sources=(SourceConfig(path=PREPARED),), tokenizer=PREPARED,
            sequence_length=256, global_batch_size=8,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="none", attention="reference", scan_layers=False),
        mesh=MeshConfig(fsdp=2, tensor=2, num_cpu_devices=4),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=30, decay_steps=500,
        ),
        checkpoint=CheckpointConfig(save_every=250),
        sample=SampleConfig(prompts=("却说曹操", "The following", "def "), max_new_tokens=48),
        num_steps=500,
        log_every=25,
        eval_every=250,
        ngram_baselines=True,
        verify_resume_steps=3,
        export_hf=True,
    )  # fmt: skip


def prepare(config: TrainConfig) -> TrainConfig:
    """Fetches the text once, curates it, trains the tokenizer, packs the rows; the second time they are there.

    Rows and tokenizer given on the command line are used instead; ValueError for one without the other.
    """
    rows_are_given = config.data.sources != (SourceConfig(path=PREPARED),)
    if rows_are_given or config.data.tokenizer != PREPARED:
        for field, value in (
            ("data.tokenizer", config.data.tokenizer),
            *((f"data.sources.{i}.path", source.path) for i, source in enumerate(config.data.sources)),
        ):
            if value == PREPARED:
                raise ValueError(
                    f"{field} is not given: the demo's own text has its own tokenizer and settings; give the path of "
                    "all rows and the tokenizer they were made with (see configs/demo_continue.py), or none of them."
                )
        return config
    try:
        from bc2_jax.curate.demo import prepare_demo
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: the demo needs pip install 'bc2_jax[data]'.") from error
    from bc2_jax.sharding import use_cpu_devices

    make = functools.partial(
        prepare_demo, vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length
    )
    if config.distributed.num_processes is None:
        use_cpu_devices(config.mesh.num_cpu_devices)  # before curation uses one
        corpus = make()
    else:  # elsewhere: JAX must not compute here before the processes of the run have joined
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            corpus = pool.submit(make).result()
    sources = tuple(SourceConfig(path=str(path), weight=WEIGHTS[name]) for name, path in corpus.sources.items())
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=sources, tokenizer=str(corpus.tokenizer))
    )
