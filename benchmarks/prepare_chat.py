"""Throughput of tools/prepare_chat.py beside a loop that encodes one conversation after another.

python benchmarks/prepare_chat.py --tokenizer tokenizer.model [--text FILE ...] [--megabytes 20] [--json OUT]

Conversations of 1 to 5 rounds, with questions of about 90 and answers of about 250 characters (log-normal), are cut
from the text of FILEs, by default modules of the standard library. Prints MB of input per second of wall and of CPU
time, in one run:

    plain            json.loads and encode_conversation for each line, on one core, without writing
    one process      all of prepare_chat: read, check, encode, split, pack, write
    N processes      the same on all cores
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bc2_jax.align.chat import encode_conversation
from bc2_jax.align.preparation_settings import RowSettings
from bc2_jax.align.row_preparation import prepare_chat
from bc2_jax.data.processes import num_cores
from bc2_jax.tokenizer import Tokenizer


def write_conversations(file: Path, texts: list[Path], size: int) -> int:
    """A .jsonl of about `size` bytes in the OpenAI format; returns its conversations."""
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    rng = random.Random(0)

    def cut(mean: float) -> str:
        length = min(1 + int(rng.lognormvariate(mean, 1.0)), 8000, len(text))
        start = rng.randrange(len(text) - length + 1)
        return text[start : start + length].strip() or "?"

    conversations = 0
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            messages = []
            for _ in range(rng.choice((1, 1, 2, 3, 5))):
                messages += [{"role": "user", "content": cut(4.5)}, {"role": "assistant", "content": cut(5.5)}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            conversations += 1
    return conversations


def encode_plainly(file: Path, tokenizer: Tokenizer, max_length: int) -> None:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            encode_conversation(tokenizer, json.loads(line)["messages"], max_length)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    texts = options.text or sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    tokenizer, cores = Tokenizer(options.tokenizer), num_cores()
    with tempfile.TemporaryDirectory() as folder:
        file, settings = Path(folder, "conversations.jsonl"), RowSettings(max_length=options.max_length)
        conversations = write_conversations(file, texts, int(options.megabytes * 1e6))
        size = file.stat().st_size / 1e6

        def prepare(processes: int) -> None:
            out = Path(folder, "rows")
            prepare_chat([file], options.tokenizer, out, settings, processes=processes, overwrite=True)

        stages: dict[str, Callable[[], None]] = {
            "plain": lambda: encode_plainly(file, tokenizer, options.max_length),
            "one process": lambda: prepare(1),
            f"{cores} processes": lambda: prepare(cores),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
        for _ in range(options.rounds):
            for name, stage in stages.items():
                begin, begin_cpu = time.perf_counter(), cpu_seconds()
                stage()
                found[name].append((size / (time.perf_counter() - begin), size / (cpu_seconds() - begin_cpu)))
    medians = {name: sorted(rates)[len(rates) // 2] for name, rates in found.items()}
    table = Table("", "MB/s", "MB a CPU second", "of plain", title=f"{conversations:,} conversations, {size:.1f} MB")
    for name, (rate, cpu) in medians.items():
        table.add_row(name, f"{rate:.2f}", f"{cpu:.2f}", f"{rate / medians['plain'][0]:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
