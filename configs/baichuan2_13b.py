"""Baichuan 2 13B from scratch (paper sections 2.3 and 2.4).

python train.py configs/baichuan2_13b.py --data.sources.0.path ROWS --data.tokenizer tokenizer.model

Hardware: any TPU slice on which 13.9 B fp32 parameters with two moments (156 GiB) fit; fsdp takes all devices.
Flags for some slices, with compile-time estimates of tools/aot_compile.py (docs/tpu.md) and the days for 2.6 T tokens:
    v5p-128 (v5p:4x4x4)      --data.global-batch-size 128
                             46.8 GiB, MFU 0.87, 4,700 tokens/s a chip, 100 days
    v5p-256 (v5p:4x4x8)      --data.global-batch-size 256
                             45.4 GiB, MFU 0.87, 4,700 tokens/s a chip, 50 days
    v5p-512 (v5p:4x8x8)      --data.global-batch-size 512
                             45.1 GiB, MFU 0.86, 4,680 tokens/s a chip, 25 days
    v5p-2048 (v5p:8x8x16)    --mesh.data 16 --data.global-batch-size 1024
                             --compute.loss-chunk 4096 --compute.remat q,k,v,attention,o,gate,up,down_proj
                             33.6 GiB, MFU 0.86, 4,690 tokens/s a chip, 6.3 days
    v5p-8192 (v5p:16x16x16)  --mesh.data 256 --mesh.fsdp 16 --mesh.fsdp-inner 1 --data.global-batch-size 4096
                             --compute.loss-chunk 4096 --compute.remat q,k,v,attention,o,gate,up,down_proj
                             42.6 GiB, MFU 0.81, 4,370 tokens/s a chip, 1.7 days
    2 x v5p-128 (v5p:4x4x4)  --mesh.data 2 --data.global-batch-size 256
                             46.3 GiB, MFU 0.85, 4,610 tokens/s a chip, 51 days
    4 x v5p-256 (v5p:4x4x8)  --mesh.data 4 --data.global-batch-size 1024
                             45.1 GiB, MFU 0.81, 4,410 tokens/s a chip, 13 days
    v5e-256 (v5e:16x16)      --data.global-batch-size 256 --compute.remat q,k,v,attention --compute.loss-chunk 2048
                             13.8 GiB (laid out), MFU 0.66, 1,540 tokens/s a chip, 76 days
    v6e-256 (v6e:16x16)      --data.global-batch-size 512 --compute.remat q,k,v,attention,up
                             --compute.loss-chunk 2048 --mesh.fsdp 16 --mesh.fsdp-inner 16
                             29.6 GiB (laid out), MFU 0.56, 6,030 tokens/s a chip, 20 days
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
