"""The parts of `bc2 paper`: tables and figures of the Baichuan 2 report, made small. All paths are in the workdir."""

from __future__ import annotations

import shlex

from bc2_jax.demo import paper_reading as reading
from bc2_jax.demo.stage import Stage
from bc2_jax.demo.stages import ROWS, make_stages

SHARED = ("texts", "curate", "tokenizer", "base", "scaling", "chat", "reward", "rl")
"""Stages of `bc2 demo --all` that the parts build on."""
SEEDS = (0, 1)
RATES = ("1e-2", "3e-2", "1e-1")
"""Peak learning rates at which models with and without NormHead are trained."""
Z_WEIGHTS = ("0", "2e-4", "1e-2")
"""Weights of the max-z loss: without, the paper's, and one that shows at this size."""
STEPS = 200
CHIPS = "v5p:8x8x16"

# A model that trains in about a minute on two cores.
_SMALL = shlex.split(
    "--model.hidden-size 96 --model.intermediate-size 288 --model.num-hidden-layers 3 --model.num-attention-heads 6 "
    "--model.initializer-range 0.06 --optimizer.warmup-steps 20"
)


def make_parts() -> list[Stage]:
    """The shared stages and all parts, in the order in which they run."""
    shared = [stage for stage in make_stages() if stage.name in SHARED]
    return [
        *shared, _waterfall(), _compression(), _positions(), _norm_head(), _max_z(), _ladder(), _curves(),
        _reward_gaps(), _alignment(), _mfu(),
    ]  # fmt: skip


# Batches of an evaluation where the loss is only to be told from a failed run's.
_FEW = ("--eval-batches", "10")


def _train(folder: str, *settings: str, steps: int = STEPS) -> tuple[str, ...]:
    """A run of the small model in `folder`."""
    return (
        "bc2", "train", "tiny_ladder", "--name", folder, *ROWS, *_SMALL, "--workdir", folder, "--resume", "auto",
        "--num-steps", str(steps), "--optimizer.decay-steps", str(steps), "--checkpoint.save-every", str(steps // 2),
        "--eval-every", str(steps // 4), *settings,
    )  # fmt: skip


def _plot(picture: str, metric: str, runs: dict[str, str], *settings: str) -> tuple[str, ...]:
    """A picture of a metric of several runs; `runs` is folder -> label."""
    named = (f"{folder}={label}" for folder, label in runs.items())
    return ("python", "-m", "bc2_jax.demo.curves", picture, "--metric", metric, *settings, *named)


def _waterfall() -> Stage:
    return Stage(
        "waterfall", "Figure 2: what each step of data processing removes",
        "The curation of the demo's text, beside the shares of the paper.",
        (), (), reading.read_waterfall, ("curate",), seconds=1,
    )  # fmt: skip


def _compression() -> Stage:
    sizes = ("3072", "6144", "8192")
    train = tuple(
        (
            "bc2", "train-tokenizer", "curated", "--vocab-size", size, "--character-coverage", "0.995",
            "--validation-fraction", "0.08", "--out", f"tokenizers/{size}.model", "--overwrite",
        )
        for size in sizes
    )  # fmt: skip
    return Stage(
        "compression", "Table 2: vocabulary size and compression of the tokenizer",
        "Tokenizers of several vocabulary sizes on the same text, in tokens a character of held-out text.",
        train, ("tokenizers",), reading.read_compression, ("tokenizer",), seconds=30,
    )  # fmt: skip


def _positions() -> Stage:
    runs = {f"positions/{kind}{seed}": f"{name}, seed {seed}"
            for seed in SEEDS for kind, name in (("rope", "RoPE"), ("alibi", "ALiBi"))}  # fmt: skip
    train = tuple(
        _train(f"positions/{kind}{seed}", "--model.position-embedding", kind, "--seed", str(seed))
        for seed in SEEDS
        for kind in ("rope", "alibi")
    )
    return Stage(
        "positions", "Section 2.3: RoPE against ALiBi",
        "The same model with each position embedding, twice, with different seeds.",
        (*train, _plot("positions.png", "cross_entropy", runs)), ("positions", "positions.png"),
        reading.read_positions, ("tokenizer",), seconds=240,
    )  # fmt: skip


def _norm_head() -> Stage:
    heads = (("with", "--model.normalize-head"), ("without", "--model.no-normalize-head"))
    train = tuple(
        _train(f"norm_head/{name}_{rate}", option, "--optimizer.peak-learning-rate", rate,
               "--optimizer.min-learning-rate", f"{float(rate) / 10:g}", *_FEW, steps=STEPS // 2)
        for rate in RATES
        for name, option in heads
    )  # fmt: skip
    runs = {f"norm_head/{name}_{rate}": f"{name} NormHead, {rate}" for rate in RATES for name, _ in heads}
    return Stage(
        "norm_head", "Appendix B: NormHead at high learning rates",
        "The same model with and without NormHead, at learning rates from usual to far too high.",
        (*train, _plot("norm_head.png", "cross_entropy", runs)), ("norm_head", "norm_head.png"),
        reading.read_norm_head, ("tokenizer",), seconds=260,
    )  # fmt: skip


def _max_z() -> Stage:
    folders = [f"max_z/{weight}" for weight in Z_WEIGHTS]
    train = tuple(
        _train(folder, "--model.z-loss-weight", weight, *_FEW)
        for folder, weight in zip(folders, Z_WEIGHTS, strict=True)
    )  # fmt: skip
    runs = {folder: f"weight {weight}" for folder, weight in zip(folders, Z_WEIGHTS, strict=True)}
    return Stage(
        "max_z", "Section 2.4: max-z loss, the size of logits and the repetition penalty",
        "The same model with several weights of the max-z loss: how large its logits are, and how much a repetition "
        "penalty changes what it predicts.",
        (
            *train,
            ("python", "-m", "bc2_jax.demo.penalties", "max_z.json", "--rows", "rows", *folders),
            _plot("max_z.png", "max_logit", runs),
        ),
        ("max_z", "max_z.json", "max_z.png"), reading.read_max_z, ("tokenizer",), seconds=220,
    )  # fmt: skip


def _ladder() -> Stage:
    return Stage(
        "ladder", "Figure 4: the scaling law and its prediction of the largest model",
        "A law fitted to the losses of the demo's smaller models, and what it predicts for the largest.",
        (), (), reading.read_ladder, ("scaling",), seconds=1,
    )  # fmt: skip


def _curves() -> Stage:
    return Stage(
        "curves", "Figure 7: benchmarks over intermediate checkpoints",
        "Multiple-choice questions made of our text, asked of every checkpoint of the pre-trained model.",
        (
            (
                "bc2", "evaluate", "base", "--checkpoints", "all", "--tasks", "mmlu,cmmlu",
                "--data-dir", "raw/benchmarks", "--out", "curves",
            ),
        ),
        ("curves",), reading.read_curves, ("base",), seconds=90,
    )  # fmt: skip


def _reward_gaps() -> Stage:
    return Stage(
        "reward_gaps", "Table 4: accuracy of the reward model by score gap",
        "The reward model of the demo on held-out pairs, by how much better the better answer is.",
        (), (), reading.read_reward_gaps, ("reward",), seconds=1,
    )  # fmt: skip


def _alignment() -> Stage:
    return Stage(
        "alignment", "Figure 6: helpfulness and harmlessness before and after alignment",
        "Held-out questions and red-team attacks, put to the model after fine-tuning and after PPO.",
        (
            (
                "bc2", "red-team", "rl", "--before", "chat", "--max-new-tokens", "24", "--planted", "2",
                "--out", "red_team",
            ),
        ),
        ("red_team",), reading.read_alignment, ("chat", "rl"), seconds=120,
    )  # fmt: skip


def _mfu() -> Stage:
    return Stage(
        "mfu", "Section 2.6: MFU on 1,024 chips",
        "The training step compiled for 1,024 chips of v5p, without one; compile-time estimates.",
        tuple(
            (
                "bc2", "estimate", f"baichuan2_{size}", "--topology", CHIPS, "--batch-per-chip", "1",
                "--json", f"mfu_{size}.json",
            )
            for size in ("7b", "13b")
        ),
        ("mfu_7b.json", "mfu_13b.json"), reading.read_mfu, seconds=420,
    )  # fmt: skip
