"""Fine-tuning on packed rows beside one padded sample per row: targets per second of the same samples, on this CPU.

python benchmarks/sft_packing.py [--rows ROWS] [--samples 128] [--length 256] [--turns 2]

Both train the same model with the same step (`bc2_jax.align.sft`), compiled once for batches of 4 rows of --length
tokens; only the number of samples per row differs. Packed and padded alternate, each over all samples. Model: hidden
256, 8 heads, 4 layers, feed-forward 704, vocabulary 8192, AdamW.

The samples come from --rows, a folder of tools/prepare_chat.py, or are made up: lengths log-normal with a median of a
quarter of a row, truncated to a row, the last 60 % of each its answer. The ratio is about that of the number of rows,
so it depends on the lengths, which are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from bc2_jax.align import sft
from bc2_jax.align.chat_rows import pack_best_fit
from bc2_jax.config import ComputeConfig, DataConfig, FineTuneConfig, MeshConfig, ModelConfig, SourceConfig
from bc2_jax.cpu import keep_heap
from bc2_jax.data.batch import IGNORED, Rows, make_put, row_to_example
from bc2_jax.data.packing import read_rows
from bc2_jax.data.row_file import START, TARGET, token_ids
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh, use_cpu_devices
from bc2_jax.tokenizer import PAD_ID
from bc2_jax.train.job import init_state, lower_train_step

VOCABULARY, BATCH = 8192, 4


def make_samples(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Made-up samples with flags, uint32 [up to `length`] each."""
    rng = np.random.default_rng(seed)
    samples = []
    for size in np.clip(rng.lognormal(np.log(length / 4), 0.8, count).astype(int), 8, length):
        tokens = rng.integers(200, VOCABULARY, size, np.uint32)
        tokens[-int(0.6 * size) :] |= TARGET
        tokens[0] |= START
        samples.append(tokens)
    return samples


def read_samples(folder: Path) -> list[np.ndarray]:
    """Those of packed conversations, their ids folded into VOCABULARY. Raises ValueError for rows of text."""
    samples: list[np.ndarray] = []
    for row in read_rows(folder, "train"):
        starts = np.flatnonzero(row & START)
        if not len(starts):
            raise ValueError(f"rows = {str(folder)!r} is not valid: it must be a folder of tools/prepare_chat.py.")
        end = np.flatnonzero(token_ids(row) != PAD_ID)[-1] + 1
        ids = np.where(token_ids(row) < VOCABULARY, token_ids(row), 200 + token_ids(row) % (VOCABULARY - 200))
        samples += np.split(ids | (row & (START | TARGET)), [*starts[1:], end])[: len(starts)]
    return samples


def make_batches(samples: list[np.ndarray], places: list[list[int]], length: int) -> Iterator[Rows]:
    """BATCH rows each, [BATCH, length], with the samples at `places` in them; empty rows fill the last."""
    rows = np.full((-(-len(places) // BATCH) * BATCH, length + 1), PAD_ID, np.uint32)
    rows[:, 0] |= START
    for row, members in zip(rows, places, strict=False):
        tokens = np.concatenate([samples[i] for i in members])
        row[: len(tokens)] = tokens
    for start in range(0, len(rows), BATCH):
        yield row_to_example(rows[start : start + BATCH])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    keep_heap()
    use_cpu_devices(1)
    samples = (read_samples(args.rows) if args.rows else make_samples(args.samples, args.length))[: args.samples]
    samples = [sample[: args.length] for sample in samples]
    lengths = [len(sample) for sample in samples]
    config = FineTuneConfig(
        name="sft_packing", init_from="none", num_steps=1_000_000,
        model=ModelConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            position_embedding="rope", vocab_size=VOCABULARY, z_loss_weight=0.0,
        ),
        data=DataConfig(
            sources=(SourceConfig(path="none"),), tokenizer="none", sequence_length=args.length,
            global_batch_size=BATCH,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", attention="chunked", attention_block=128),
        mesh=MeshConfig(num_cpu_devices=1),
    )  # fmt: skip
    config = config.resolve(1)
    mesh = make_mesh(config.mesh)
    batches = {
        "packed": list(make_batches(samples, pack_best_fit(lengths, args.length), args.length)),
        "padded": list(make_batches(samples, [[i] for i in range(len(samples))], args.length)),
    }
    targets = {name: sum(int((rows["labels"] != IGNORED).sum()) for rows in found) for name, found in batches.items()}
    assert targets["packed"] == targets["padded"], targets
    print(
        f"{len(samples)} samples of {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}; "
        f"{sum(lengths):,} tokens, {targets['packed']:,} targets",
        flush=True,
    )
    with jax.set_mesh(mesh):
        parts = sft.make_step(config, mesh)
        put = make_put(config.data, mesh)
        state = init_state(init_params(config.model, 0, mesh), parts.optimizer)
        step = lower_train_step(parts.objective, parts.optimizer, parts.state, {}, parts.batch).compile()
        rates: dict[str, list[float]] = {name: [] for name in batches}
        for turn in range(args.turns + 1):
            for name, found in batches.items():
                begin = time.perf_counter()
                for number, rows in enumerate(found if turn else found[:1]):  # the first turn warms up
                    state, _ = step(state, {}, parts.complete(number, put(rows)))
                jax.block_until_ready(state)
                if turn:
                    rates[name].append(targets[name] / (time.perf_counter() - begin))
    for name, found in batches.items():
        filled = sum(lengths) / (len(found) * BATCH * args.length)
        print(
            f"{name}: {len(found)} steps, {filled:.1%} of the positions are tokens, "
            f"{statistics.median(rates[name]):,.0f} targets/s ({', '.join(f'{rate:,.0f}' for rate in rates[name])})"
        )
    print(f"packed / padded = {statistics.median(rates['packed']) / statistics.median(rates['padded']):.2f}")


if __name__ == "__main__":
    main()
