"""Baichuan 2 13B from base to chat model: supervised fine-tuning with the released hyper-parameters.

python tools/prepare_chat.py DATA ... --tokenizer Baichuan2-13B-Base/tokenizer.model --out ROWS
python train.py configs/baichuan2_13b_chat.py --init-from Baichuan2-13B-Base --data.sources.0.path ROWS

As adapters (LoRA) beside the frozen base in bf16, with the ten times larger learning rate that is usual for them:
    --lora.rank 16 --lora.alpha 32 --optimizer.peak-learning-rate 2e-4 --optimizer.min-learning-rate 2e-4

From the authors' fine-tuning script, which is for 7B: AdamW (0.9, 0.98, 1e-8) with a constant learning rate of 2e-5
and no warm-up, weight decay 1e-4, gradients clipped at 1.0, bf16, 4 epochs, no max-z loss, the loss on the answers of
all turns. They took 16 samples a device, each padded or cut to 512 tokens: 65,536 positions a step on a machine with 8
devices. A step has as many here, 16 rows of 4,096; as samples are packed into them, nearly all positions are tokens,
and a pass over the data takes fewer steps.

Hardware (compile-time estimates of tools/aot_compile.py, docs/tpu.md; 1 row a chip):
    v5p-128 (v5p:4x4x4)  --data.global-batch-size 64
                         28.9 GiB of 95, MFU 0.78, 4,220 tokens/s a chip
    v5e-8 (v5e:2x4)      --lora.rank 16 --compute.remat full
                         9.8 GiB of 16, MFU 0.53, 1,770 tokens/s a chip
    v6e-4 (v6e:2x2)      --lora.rank 16 --compute.remat full
                         14.2 GiB of 32, MFU 0.33, 5,260 tokens/s a chip
Every axis of the mesh that cuts the batch must divide its rows; --mesh.context cuts the rows themselves.
Not yet run on hardware.
"""

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.config import BAICHUAN2_13B, FineTuneConfig

CHAT_7B = runpy.run_path(str(Path(__file__).with_name("baichuan2_7b_chat.py")))


def config() -> FineTuneConfig:
    model = dataclasses.replace(BAICHUAN2_13B, z_loss_weight=0.0)
    return dataclasses.replace(CHAT_7B["config"](), name="baichuan2_13b_chat", model=model)
