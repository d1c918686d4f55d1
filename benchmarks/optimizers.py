"""Loss, memory and time of each way to store Adam's moments, beside AdamW with fp32 moments in the same run.

python benchmarks/optimizers.py [--steps 200] [--seeds 0 1] [--options adamw bf16 ...] [--json OUT]

Trains a small Baichuan 2 (hidden 128, 4 layers, vocabulary 4096) on the demo's text in bf16 from the same start, on the
same batches, once for each option and seed, about 1.5 CPU minutes each with 150 steps. Prints the loss on the held-out
rows, its difference from AdamW's of the same seed, that of the mean loss of the last quarter of the steps, the bytes of
the optimizer's state per parameter, and the median time of the update alone. The noise to compare with is what another
seed changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bc2_jax.cpu import keep_heap
from bc2_jax.sharding import make_mesh, use_cpu_devices

keep_heap()
use_cpu_devices(1)

import jax  # noqa: E402  # after the devices are chosen
import optax  # noqa: E402  # the same
from rich.console import Console  # noqa: E402  # the same
from rich.table import Table  # noqa: E402  # the same

from bc2_jax.config import (  # noqa: E402  # the same
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from bc2_jax.curate.demo import prepare_demo  # noqa: E402  # the same
from bc2_jax.data.loader import BadRows  # noqa: E402  # the same
from bc2_jax.data.row_batches import RowBatches, ValidationBatches  # noqa: E402  # the same
from bc2_jax.model.baichuan import init_params  # noqa: E402  # the same
from bc2_jax.train.job import Parts, make_eval_step  # noqa: E402  # the same
from bc2_jax.train.optimizer import make_optimizer  # noqa: E402  # the same
from bc2_jax.train.pretrain import make_objective  # noqa: E402  # the same

BF16, INT8 = {"moment_dtype": "bfloat16"}, {"moment_dtype": "int8", "stochastic_rounding": True}
RANDOM, SLOW = {"stochastic_rounding": True}, {"b2": 0.999}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bf16": BF16,
    "bf16 stochastic": BF16 | RANDOM,
    "int8": INT8,
    "adamw b2=.999": SLOW,
    "bf16 b2=.999": BF16 | SLOW,
    "bf16 stochastic b2=.999": BF16 | RANDOM | SLOW,
    "int8 b2=.999": INT8 | SLOW,
}
HELD_OUT = 16
"""Batches of 1,024 tokens."""


def make_config(steps: int, seed: int) -> TrainConfig:
    corpus = prepare_demo()
    weights = {"zh": 5, "en": 1, "code": 7}  # as in configs/demo.py
    return TrainConfig(
        name="optimizers",
        model=ModelConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
            position_embedding="alibi", vocab_size=4096, model_max_length=256, initializer_range=0.04,
        ),
        data=DataConfig(
            sources=tuple(SourceConfig(path=str(corpus.sources[k]), weight=weights[k]) for k in corpus.sources),
            tokenizer=str(corpus.tokenizer), sequence_length=256, global_batch_size=4, seed=seed,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="none", attention="reference"),
        mesh=MeshConfig(num_cpu_devices=1),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=min(30, steps - 1), decay_steps=steps
        ),
        seed=seed, num_steps=steps,
    )  # fmt: skip


class Trainer:
    """Trains with one option after another; forward and backward are compiled once."""

    def __init__(self, config: TrainConfig) -> None:
        self.objective = objective = make_objective(config.model, config.compute)

        def mean_loss(params: Any, batch: Any) -> Any:
            micro = jax.tree.map(lambda x: x[0], batch)
            return objective.loss(params, {}, micro)[0] / objective.weight(batch)

        self.backward = jax.jit(jax.value_and_grad(mean_loss))
        self.evaluate = jax.jit(make_eval_step(objective))

    def run(self, config: TrainConfig, mesh: Any) -> dict[str, Any]:
        optimizer, bad_rows = make_optimizer(config.optimizer), BadRows(0)

        def apply(grads: Any, state: Any, params: Any) -> Any:
            changes, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, changes), state

        update = jax.jit(apply, donate_argnums=(1, 2))
        params = init_params(config.model, config.seed, mesh)
        state = jax.jit(optimizer.init)(params)
        batches, losses, seconds = RowBatches(config.data, mesh, config.num_steps, bad_rows), [], []
        for step in range(config.num_steps):
            loss, grads = jax.block_until_ready(self.backward(params, batches.next(step + 1)))
            begin = time.perf_counter()
            params, state = jax.block_until_ready(update(grads, state, params))
            seconds.append(time.perf_counter() - begin)
            losses.append(float(loss))
        batches.close()
        held_out = ValidationBatches(config.data, mesh, bad_rows)
        batches_seen = (held_out[index] for index in range(min(HELD_OUT, len(held_out))))
        parts = functools.reduce(Parts.plus, (self.evaluate(params, {}, batch) for batch in batches_seen))
        size = sum(x.size for x in jax.tree.leaves(params))
        return {
            "validation_loss": float(self.objective.metrics(parts)["loss"]),
            "last_quarter_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
            "bytes_per_parameter": sum(x.nbytes for x in jax.tree.leaves(state)) / size,
            "update_seconds": statistics.median(seconds),
            "losses": losses,
        }


def make_rows(results: dict[str, dict[int, dict[str, Any]]]) -> list[list[str]]:
    """Cells of the table: each option beside the first one with its b2."""
    rows, base = [], {}
    for name, by_seed in results.items():
        if "adamw" in name:
            base = by_seed
        cells = [name]
        for field in ("validation_loss", "last_quarter_loss"):
            cells.append(" ".join(f"{run[field]:.4f}" for run in by_seed.values()))
            cells.append(" ".join(f"{run[field] - base[seed][field]:+.4f}" for seed, run in by_seed.items()))
        one = next(iter(by_seed.values()))
        cells.append(f"{one['bytes_per_parameter']:.3f}")
        cells.append(f"{1e3 * statistics.median(run['update_seconds'] for run in by_seed.values()):.1f}")
        rows.append(cells)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--options", nargs="+", choices=tuple(OPTIONS), default=tuple(OPTIONS))
    parser.add_argument("--json", type=Path, help="write all losses and figures")
    args = parser.parse_args()
    mesh, console = make_mesh(MeshConfig(num_cpu_devices=1)), Console()
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in args.options}
    with jax.set_mesh(mesh):
        trainer = Trainer(make_config(args.steps, 0))
        for seed in args.seeds:
            config = make_config(args.steps, seed)
            for name in args.options:
                optimizer = dataclasses.replace(config.optimizer, **OPTIONS[name])
                results[name][seed] = trainer.run(dataclasses.replace(config, optimizer=optimizer), mesh)
                shown = {k: round(v, 4) for k, v in results[name][seed].items() if k != "losses"}
                console.print(f"seed {seed}, {name}: {shown}")
                if args.json:
                    args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
    table = Table("", "held-out loss", "- AdamW", "last quarter", "- AdamW", "B/parameter", "update ms")
    for row in make_rows(results):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
