"""Rollouts with refilled rows beside decoding in fixed batches: the same prompts and answers, in one process.

python benchmarks/rollout.py [--rows 16] [--answers 128] [--groups 1 2 4 8]

A small model with random weights whose answers end at random: lengths are geometric, roughly as a chat model's.
Rounds of all ways alternate and the fastest round counts. `used` is the share of row steps that gave a token. On an
accelerator a step costs the same however many rows are active, so `used` is what counts there; here tokens/s follow
it as far as a step's time is not spent on the host.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import PlacedPrompt, make_chunk
from bc2_jax.infer.generate import Continuation, Continuations, cache_slots
from bc2_jax.infer.refill import continue_many
from bc2_jax.infer.settings import MOST_EOS, Settings, sampling_of
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.terminal import make_console, make_table

MEAN_LENGTH, MOST, PROMPT = 64, 256, 64
CONFIG = ModelConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, position_embedding="alibi",
    vocab_size=MEAN_LENGTH * MOST_EOS, model_max_length=512,
)  # fmt: skip


def continue_in_batches(
    prepared: engine.Prepared, prompts: list[list[int]], settings: Settings, rows: int
) -> tuple[list[Continuation], float]:
    """What `continue_many` gives, of batches that end with their longest answer; and the share of row steps used."""
    found: list[Continuation] = []
    taken, slots, nobody = 0, cache_slots(PROMPT + MOST), np.zeros(rows, bool)
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        sampling = sampling_of([settings] * rows, range(first, first + rows))
        sampling = sampling._replace(top_log_probs=np.zeros(rows, np.int32))
        decoding, continuations = engine.allocate(prepared, sampling, slots=slots), Continuations(rows)
        placed = [PlacedPrompt(row, ids) for row, ids in enumerate(batch)] + [None] * (rows - len(batch))
        chunk = make_chunk(placed, 0, engine.chunk_length(), slots)
        assert chunk.is_last_R.sum() == len(batch)
        decoding, emitted, _ = engine.extend(prepared, decoding, chunk, sampling)
        continuations.add(emitted)
        while continuations.running:
            decoding, emitted = engine.decode(prepared, decoding, engine.STEPS, nobody)
            continuations.add(emitted)
        found += [continuations.get(row) for row in range(len(batch))]
        taken += rows * (max(len(continuation.tokens) for continuation in found[first:]) - 1)
    return found, sum(len(continuation.tokens) - 1 for continuation in found) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="answers at one time")
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="steps between refills")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepared = engine.prepare(Baichuan2(CONFIG, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(MOST_EOS, CONFIG.vocab_size, rng.integers(8, PROMPT)).tolist() for _ in range(args.answers)]
    settings = Settings(
        MOST, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=1, eos_token_id=range(MOST_EOS)
    ).check(CONFIG)

    def refilled(group: int) -> tuple[list[Continuation], float]:
        found, stats = continue_many(
            prepared, prompts, settings, rows=args.rows, log_probs=True, prompt_slots=PROMPT, group=group
        )
        return found, stats.share_used

    ways: dict[str, Callable[[], tuple[list[Continuation], float]]] = {
        "fixed batches": lambda: continue_in_batches(prepared, prompts, settings, args.rows)
    }
    ways |= {f"refilled every {group} steps": functools.partial(refilled, group) for group in args.groups}
    results = {name: way() for name, way in ways.items()}  # compiles
    answers = [continuation.tokens for continuation in results["fixed batches"][0]]
    assert all([c.tokens for c in found] == answers for found, _ in results.values())
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    tokens = sum(map(len, answers))
    title = (
        f"{args.answers} answers of {tokens / args.answers:.0f} tokens on average, over {args.rows} rows, on "
        f"{jax.devices()[0].device_kind}"
    )
    table = make_table("", "used", "tokens/s", "ratio", title=title, numbers_from=1)
    for name in ways:
        rate, plain = tokens / seconds[name], tokens / seconds["fixed batches"]
        table.add_row(name, f"{results[name][1]:.3f}", f"{rate:,.0f}", f"{rate / plain:.2f}")
    make_console().print(table)


if __name__ == "__main__":
    main()
