"""Evaluation requests per second on this CPU, beside lm-eval's backend for transformers in the same run.

python benchmarks/evaluate.py [--threads 2] [--subjects 2] [--questions 40] [--torch-python PYTHON]

Both score the same requests with the same model (RoPE, random weights, fp32; lm-eval reads the llama layout that
tools/convert.py writes): questions with four letters after the five shots of their subject, and whole texts. They
alternate, one process each time. A process runs everything once to compile and then several times; the fastest run
counts. Compare CPU seconds, which other work on the machine affects least. --torch-python is a Python with lm-eval,
transformers and torch (by default this one). lm-eval runs a question once for its four letters but repeats the shots
of a subject for each question; our rows hold the shots once for all questions of the subject.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bc2_jax.terminal import make_console, make_table

_MODULES = (
    "argparse",
    "ast",
    "functools",
    "heapq",
    "json/decoder",
    "shutil",
    "random",
    "textwrap",
    "typing",
    "datetime",
)
_VOCABULARY = 4096
_LETTERS = (" A", " B", " C", " D")


def make_requests(subjects: int, questions: int, texts: int) -> dict[str, Any]:
    """Questions about lines of the standard library, and texts of it of 1,000 to 30,000 characters."""
    random.seed(0)
    folder = Path(sysconfig.get_path("stdlib"))
    source = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]
    lines = [line.strip() for text in source for line in text.splitlines() if len(line) > 30]

    def question() -> str:
        options = "".join(f"\n{letter}. {random.choice(lines)[:40]}" for letter in "ABCD")
        return f"{random.choice(lines)} {random.choice(lines)}{options}\nAnswer:"

    letters = []
    for subject in range(subjects):
        shots = "".join(f"{question()}{random.choice(_LETTERS)}\n\n" for _ in range(5))
        header = f"The following are multiple choice questions (with answers) about subject {subject}.\n\n"
        letters += [
            (header + shots + asked, letter) for asked in [question() for _ in range(questions)] for letter in _LETTERS
        ]
    sizes = [1000 * 30 ** (i / max(texts - 1, 1)) for i in range(texts)]
    whole = "\n".join(source)
    starts = [random.randrange(len(whole) - 40_000) for _ in sizes]
    return {
        "letters": letters,
        "rolling": [whole[start : start + int(size)] for start, size in zip(starts, sizes, strict=True)],
        "train": source,
    }


def make_models(folder: Path, requests: dict[str, Any], args: argparse.Namespace) -> None:
    """FOLDER/ours and FOLDER/llama, the same model."""
    from bc2_jax.config import MeshConfig, ModelConfig
    from bc2_jax.convert.conversion import to_hf
    from bc2_jax.convert.pretrained import save_params
    from bc2_jax.model.baichuan import init_params
    from bc2_jax.sharding import make_mesh
    from bc2_jax.tokenizer import train_tokenizer

    train_tokenizer(requests["train"], folder / "tokenizer.model", _VOCABULARY)
    config = ModelConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 16 * 16, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, position_embedding="rope", vocab_size=_VOCABULARY,
        model_max_length=args.context,
    )  # fmt: skip
    params = init_params(config, 0, make_mesh(MeshConfig(num_cpu_devices=1)))
    save_params(params, config, folder / "ours", folder / "tokenizer.model")
    to_hf(folder / "ours", folder / "llama", dtype="float32", layout="llama")
    (folder / "llama" / "generation_config.json").unlink(missing_ok=True)


def run_ours(folder: Path, args: argparse.Namespace) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    import bc2_jax
    from bc2_jax.evaluate import Scorer
    from bc2_jax.tokenizer import Tokenizer

    scorer = Scorer(bc2_jax.load_pretrained(folder / "ours"), Tokenizer(folder / "tokenizer.model"))

    def letters(pairs: list[list[str]]) -> list[float]:
        return [log_prob for log_prob, _ in scorer.loglikelihood([(context, letter) for context, letter in pairs])]

    return letters, scorer.rolling, scorer.stats


def run_theirs(folder: Path, args: argparse.Namespace) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(args.threads)
    model = HFLM(
        pretrained=str(folder / "llama"), dtype="float32", device="cpu", batch_size=args.batch, add_bos_token=False
    )

    def letters(pairs: list[list[str]]) -> list[float]:
        asked = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
        return [log_prob for log_prob, _ in model.loglikelihood(asked, disable_tqdm=True)]

    def rolling(texts: list[str]) -> list[float]:
        asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
        return model.loglikelihood_rolling(asked, disable_tqdm=True)

    return letters, rolling, None


def run_turn(args: argparse.Namespace) -> dict[str, Any]:
    """One process: seconds of the first and of the fastest run of each kind of request, and the answers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    folder = Path(args.turn[1])
    requests = json.loads((folder / "requests.json").read_text("utf-8"))
    letters, rolling, stats = {"ours": run_ours, "theirs": run_theirs}[args.turn[0]](folder, args)
    found: dict[str, Any] = {}
    for name, run in (("letters", letters), ("rolling", rolling)):
        seconds, cpu_seconds = [], []
        before = (stats.tokens_fed, stats.tokens_unshared, stats.slots) if stats else (0, 0, 0)
        for _ in range(args.rounds + 1):
            start, cpu = time.perf_counter(), time.process_time()
            answers = run(requests[name])
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
        found[name] = {
            "first": seconds[0], "seconds": min(seconds[1:]), "cpu": min(cpu_seconds[1:]), "answers": answers
        }  # fmt: skip
        if stats:
            after = (stats.tokens_fed, stats.tokens_unshared, stats.slots)
            fed, unshared, slots = (a - b for a, b in zip(after, before, strict=True))
            found[name] |= {"unshared": unshared / fed, "padding": 1 - fed / slots}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--questions", type=int, default=40, help="of a subject (default %(default)s)")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPUs (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="batch size of lm-eval's backend (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of a turn, after the first (default %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="processes of each (default %(default)s)")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(run_turn(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = make_requests(args.subjects, args.questions, args.texts)
        (folder / "requests.json").write_text(json.dumps(requests), "utf-8")
        make_models(folder, requests, args)
        pythons = {"ours": sys.executable, "theirs": args.torch_python}
        found: dict[str, list[dict[str, Any]]] = {who: [] for who in pythons}
        for _ in range(args.turns):
            for who, python in pythons.items():
                command = [python, __file__, *sys.argv[1:], "--turn", who, name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[who].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, requests, found)


def report(args: argparse.Namespace, requests: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> None:
    title = f"{args.layers} layers of {args.hidden}, context {args.context}, fp32, {args.threads} threads"
    headers = ("requests", "first run, s", "s", "CPU s", "requests / s", "ratio", "of CPU s", "shared", "padding")
    table = make_table("", "", *headers, title=title, numbers_from=2)
    for kind in ("letters", "rolling"):
        count = len(requests[kind])
        wall, cpu = (
            {who: min(turn[kind][clock] for turn in turns) for who, turns in found.items()}
            for clock in ("seconds", "cpu")
        )
        for who, turns in found.items():
            last = turns[-1][kind]
            ours = who == "ours"
            ratios = [f"{clock['theirs'] / clock[who]:.2f}" if ours else "" for clock in (wall, cpu)]
            sharing = [f"{last['unshared']:.1f}x", f"{last['padding']:.0%}"] if ours else ["", ""]
            table.add_row(
                kind, "bc2_jax" if ours else "lm-eval, transformers", f"{count:,}",
                f"{statistics.median(turn[kind]['first'] for turn in turns):.1f}", f"{wall[who]:.2f}",
                f"{cpu[who]:.2f}", f"{count / wall[who]:,.2f}", *ratios, *sharing,
            )  # fmt: skip
    make_console().print(table)
    for kind in ("letters", "rolling"):
        pairs = zip(found["ours"][-1][kind]["answers"], found["theirs"][-1][kind]["answers"], strict=True)
        print(f"{kind}: largest difference, relative: {max(abs(a - b) / abs(b) for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
