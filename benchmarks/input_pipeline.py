"""How fast batches of training come from packed rows on disk, against reading the same rows and nothing else.

python benchmarks/input_pipeline.py [--sequence-length 4096] [--rows 8192] [--batch 64] [--folder DIR] [--json OUT]

Writes two sources of synthetic rows (documents of 1 to 2,000 tokens) into DIR, or a temporary folder, and prints for
each of these, in one run and on one core, the median tokens/s of some rounds and the ratio to the first:

    read          records one by one in random order, from Grain's data source, and nothing done with them
    batches       the whole of what training reads: mixed, shuffled, stacked, segments, positions and labels
    read ahead    the same through the iterator, which prepares batches on its own thread

The files were just written: they are in the page cache, so disks play no part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bc2_jax.config import DataConfig, MixtureStage, SourceConfig
from bc2_jax.data.loader import make_train_iterator, make_train_loader
from bc2_jax.data.packing import RowManifest, RowWriter, SplitInfo, TextCounts, load_manifest, write_manifest
from bc2_jax.files import file_sha256
from bc2_jax.tokenizer import EOS_ID, PAD_ID

VOCAB_SIZE = 125_696
NO_SPLIT = SplitInfo(documents=0, characters=0, bytes=0, tokens=0, rows=0, padding=0, files=())


def write_rows(folder: Path, rows: int, sequence_length: int, tokenizer: Path, seed: int) -> None:
    """A folder of packed rows as tools/tokenize_corpus.py writes it, without text behind it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    writer = RowWriter(folder, "train", sequence_length, rows_per_file=4096)
    counts = TextCounts()
    left = rows * sequence_length + 1
    while left:
        ids = rng.integers(300, VOCAB_SIZE, min(left, int(rng.integers(1, 2001))), dtype=np.uint32)
        ids[-1] = EOS_ID
        writer.add(ids)
        counts.documents += 1
        counts.tokens += len(ids)
        left -= len(ids)
    write_manifest(
        folder,
        RowManifest(
            sequence_length=sequence_length, vocab_size=VOCAB_SIZE, eos_id=EOS_ID, pad_id=PAD_ID,
            tokenizer_sha256=file_sha256(tokenizer), validation_fraction=0.0, documents=counts.documents,
            empty_documents=0, invalid_documents=0, train=writer.close(counts, PAD_ID), validation=NO_SPLIT,
        ),
    )  # fmt: skip


def read_records(data: DataConfig) -> Iterator[int]:
    import grain

    files = [str(Path(s.path, file.name)) for s in data.sources for file in load_manifest(s.path).train.files]
    records = grain.sources.ArrayRecordDataSource(files)
    rng = np.random.default_rng(0)
    while True:
        for index in rng.integers(0, len(records), data.global_batch_size).tolist():
            records[index]
        yield data.global_batch_size


def read_batches(data: DataConfig) -> Iterator[int]:
    loader = make_train_loader(data, process_index=0, process_count=1)
    step = 0
    while True:
        yield len(loader[step]["input_ids"])
        step += 1


def read_ahead(data: DataConfig) -> Iterator[int]:
    iterator = make_train_iterator(make_train_loader(data, process_index=0, process_count=1))
    while True:
        yield len(next(iterator)["input_ids"])


STAGES: dict[str, Callable[[DataConfig], Iterator[int]]] = {
    "read": read_records,
    "batches": read_batches,
    "read ahead": read_ahead,
}


def measure(rows: Iterator[int], tokens: int, sequence_length: int) -> tuple[float, float]:
    """Tokens a second, and a second of CPU time, of reading about `tokens`."""
    begin, begin_cpu, done = time.perf_counter(), time.process_time(), 0
    while done < tokens:
        done += next(rows) * sequence_length
    return done / (time.perf_counter() - begin), done / (time.process_time() - begin_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8192, help="rows on disk (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows a batch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the rows; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tokenizer = Path(folder, "tokenizer.model")
        tokenizer.write_bytes(b"stands for a tokenizer: rows name theirs by a hash")
        for seed, name in enumerate("ab"):
            write_rows(Path(folder, name), options.rows // 2, options.sequence_length, tokenizer, seed)
        data = DataConfig(
            sources=tuple(SourceConfig(path=str(Path(folder, name)), weight=w) for name, w in (("a", 0.7), ("b", 0.3))),
            stages=(MixtureStage(start_tokens=options.rows * options.sequence_length, weights=(0.5, 0.5)),),
            tokenizer=str(tokenizer), sequence_length=options.sequence_length, global_batch_size=options.batch,
        )  # fmt: skip
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in STAGES}
        tokens = options.rows * options.sequence_length // 4
        for _ in range(options.rounds):
            for name, stage in STAGES.items():
                rows = stage(data)
                measure(rows, 1, options.sequence_length)
                found[name].append(measure(rows, tokens, options.sequence_length))
    medians = {
        name: {
            "tokens_per_second": statistics.median(wall for wall, _ in rounds),
            "tokens_per_cpu_second": statistics.median(cpu for _, cpu in rounds),
        }
        for name, rounds in found.items()
    }
    table = Table("", "Mtok/s", "Mtok a CPU second", "of reading", title_justify="left")
    first = medians["read"]["tokens_per_cpu_second"]
    for name, values in medians.items():
        wall, cpu = values["tokens_per_second"], values["tokens_per_cpu_second"]
        table.add_row(name, f"{wall / 1e6:.1f}", f"{cpu / 1e6:.1f}", f"{cpu / first:.0%}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
