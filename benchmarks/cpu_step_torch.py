"""The step of cpu_step.py in PyTorch: python cpu_step_torch.py float32|bfloat16 STEPS [compile]; prints one JSON line.

Eager, or forward, loss and backward through torch.compile.
float32 throughout, or bfloat16 autocast with fp32 weights; fused AdamW; attention by scaled_dot_product_attention.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

D, N, L, FFN, V, B, T = 512, 8, 8, 1376, 16384, 4, 512


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up = nn.Linear(D, FFN, bias=False), nn.Linear(D, FFN, bias=False)
        self.down = nn.Linear(FFN, D, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, N, D // N).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(L)), nn.RMSNorm(D, eps=1e-6)

    def forward(self, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def main(dtype: str, steps: int, compiled: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    tokens = torch.randint(3, V, (B, T + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    angles = torch.outer(torch.arange(T), 10000 ** -(torch.arange(0, D // N, 2) / (D // N)))
    cos, sin = angles.cos(), angles.sin()

    def loss_of(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(inputs, cos, sin)
        return F.cross_entropy(logits.view(-1, V).float(), labels)

    forward = torch.compile(loss_of) if compiled else loss_of
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        loss = forward(inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
    summary = {"median": statistics.median(seconds[1:]), "min": min(seconds[1:])}
    print(json.dumps(summary | {"cpu": statistics.median(cpu_seconds[1:]), "loss": loss.item()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "compile" in sys.argv[3:])
