"""Baichuan 2 13B from scratch (paper sections 2.3 and 2.4).

python train.py configs/baichuan2_13b.py --data.sources.0.path ROWS --data.tokenizer tokenizer.model

Hardware: any TPU slice on which 13.9 B fp32 parameters with two moments (156 GiB) fit; fsdp takes all devices.
Compile-time estimates of tools/aot_compile.py (docs/tpu.md), with the days for 2.6 T tokens:
    v5p:4x4x8 (128 chips), --data.global-batch-size 256: 46.0 GiB a chip, MFU 0.82, 4,400 tokens/s a chip, 53 days
    v5e:16x16 (256 chips), --data.global-batch-size 256 --compute.remat save_attention: 12.2 GiB, 0.60, 1,400, 84 days
The global batch is ours: the paper does not print it. Expected loss: 12.24 at the first step (ln V + 0.5). Not yet
run on hardware.
"""

from bc2_jax.config import BAICHUAN2_13B, ComputeConfig, DataConfig, OptimizerConfig, SourceConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        name="baichuan2_13b",
        model=BAICHUAN2_13B,
        data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model"),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        optimizer=OptimizerConfig(peak_learning_rate=1.5e-4),
        # 2.6 T tokens at 1024 x 4096 a step.
        num_steps=620_000,
    )
