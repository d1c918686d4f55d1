"""Baichuan 2 7B from scratch (paper sections 2.3 and 2.4).

python train.py configs/baichuan2_7b.py --data.sources.0.path ROWS --data.tokenizer tokenizer.model

Hardware: any TPU slice on which 7.5 B fp32 parameters with two moments (84 GiB) fit; fsdp takes all devices.
Flags for some slices, with compile-time estimates of tools/aot_compile.py (docs/tpu.md) and the days for 2.6 T tokens:
    v5p-128 (v5p:4x4x4)      --data.global-batch-size 128
                             31.2 GiB, MFU 0.85, 8,660 tokens/s a chip, 54 days
    v5p-512 (v5p:4x8x8)      --data.global-batch-size 512
                             30.8 GiB, MFU 0.86, 8,700 tokens/s a chip, 14 days
    v5p-2048 (v5p:8x8x16)    --mesh.data 16 --data.global-batch-size 1024
                             --compute.loss-chunk 4096 --compute.remat q,k,v,attention,o,gate,up,down_proj
                             22.9 GiB, MFU 0.85, 8,620 tokens/s a chip, 3.4 days
    v5p-8192 (v5p:16x16x16)  --mesh.data 256 --mesh.fsdp 16 --mesh.fsdp-inner 1 --data.global-batch-size 4096
                             --compute.loss-chunk 4096 --compute.remat q,k,v,attention,o,gate,up,down_proj
                             27.1 GiB, MFU 0.79, 7,980 tokens/s a chip, 0.9 days
    2 x v5p-128 (v5p:4x4x4)  --mesh.data 2 --data.global-batch-size 256
                             31.0 GiB, MFU 0.83, 8,480 tokens/s a chip, 28 days
    4 x v5p-256 (v5p:4x4x8)  --mesh.data 4 --data.global-batch-size 1024
                             30.5 GiB, MFU 0.84, 8,510 tokens/s a chip, 6.9 days
    v5e-256 (v5e:16x16)      --data.global-batch-size 256 --compute.remat q,k,v,attention,o,up --compute.loss-chunk 2048
                             13.0 GiB (laid out), MFU 0.71, 3,100 tokens/s a chip, 38 days
    v6e-256 (v6e:16x16)      --data.global-batch-size 512 --compute.loss-chunk 2048 --mesh.fsdp 16 --mesh.fsdp-inner 16
                             31.7 GiB, MFU 0.57, 11,530 tokens/s a chip, 10 days
The global batch is ours: the paper does not print it. Expected loss: 12.24 at the first step (ln V + 0.5). Not yet
run on hardware.
"""

from bc2_jax.config import BAICHUAN2_7B, ComputeConfig, DataConfig, OptimizerConfig, SourceConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        name="baichuan2_7b",
        model=BAICHUAN2_7B,
        data=DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model"),
        compute=ComputeConfig(attention="flash", remat="save_dots"),
        optimizer=OptimizerConfig(peak_learning_rate=2e-4),
        # 2.6 T tokens at 1024 x 4096 a step.
        num_steps=620_000,
    )
