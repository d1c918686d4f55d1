"""The RoPE step of gpu_step.py with transformers' LLaMA: python gpu_step_torch.py SHAPE_AS_JSON; prints one JSON line.

fp32 weights, bf16 autocast, fused AdamW, gradient checkpointing and torch.compile on a GPU; eager and sdpa on a CPU.
"""

import importlib.util
import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    attention = "flash_attention_2" if on_gpu and importlib.util.find_spec("flash_attn") else "sdpa"
    config = LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"], vocab_size=shape["vocab"],
        max_position_embeddings=shape["length"], attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(config).to(device)
    model.train()
    run = model
    if on_gpu:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        run = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(3, shape["vocab"], (shape["rows"], shape["length"]), device=device)
    seconds = []
    for _ in range(shape["steps"] + 2):
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    how = f"{attention}, torch.compile" if on_gpu else f"{attention}, eager"
    print(
        json.dumps({"seconds": statistics.median(seconds[2:]), "device": name, "loss": loss.item(), "attention": how})
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
