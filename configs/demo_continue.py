"""The demo's model trained further on text of your own, or trained on it from the beginning.

python train.py                          # the demo: its model and its tokenizer are in runs/demo
python tools/tokenize_corpus.py TEXTS --tokenizer runs/demo/tokenizer.model --sequence-length 256 --out rows
python train.py configs/demo_continue.py --data.sources.0.path rows

From random parameters, with another tokenizer of at most 4,096 pieces (tools/train_tokenizer.py):
python train.py configs/demo_continue.py --data.sources.0.path rows --data.tokenizer MINE.model --init-from None
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import DataConfig, OptimizerConfig, SampleConfig, SourceConfig, TrainConfig

DEMO = runpy.run_path(str(Path(__file__).with_name("demo.py")))


def config() -> TrainConfig:
    demo = DEMO["config"]()
    return dataclasses.replace(
        demo,
        name="demo_continue",
        init_from="runs/demo",
        data=DataConfig(
            sources=(SourceConfig(path="rows"),), tokenizer="runs/demo/tokenizer.model",
            sequence_length=demo.data.sequence_length, global_batch_size=demo.data.global_batch_size,
        ),
        # The moments start again: a short warm-up, and a lower peak than that of the first training.
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, decay_steps=100,
        ),
        checkpoint=dataclasses.replace(demo.checkpoint, save_every=50),
        sample=SampleConfig(),
        num_steps=100,
        eval_every=50,
    )  # fmt: skip
