"""A run: how the model is computed and trained, on which data, and what is written."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from bc2_jax.config.distributed import DistributedConfig
from bc2_jax.config.health import HealthConfig
from bc2_jax.config.mesh import MeshConfig, check_divisible
from bc2_jax.config.model import ModelConfig
from bc2_jax.validation import choices, divisors, require, require_literals, require_positive

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; changes speed and memory, not what is learnt."""

    dtype: DType = "bfloat16"
    """Matmul and activation dtype. Master weights, norms, softmax, logits and losses are always float32."""
    attention: Literal["reference", "chunked", "flash"] = "chunked"
    """reference: one einsum, holds [heads, T, S]. chunked: online softmax over blocks, memory linear in length. flash:
    the same as Pallas kernels, for TPU alone."""
    attention_block: int = 512
    """Queries and keys per block of the chunked attention."""
    remat: Literal["none", "full", "save_dots", "save_projections", "save_attention", "offload"] = "full"
    """What each layer keeps for the backward pass: everything, nothing but its input, all matmul results, those of
    attention, the attention result alone, or all matmul results in host memory."""
    scan_layers: bool = True
    """Compile one layer and loop over it, or unroll all of them."""
    compiler_options: Literal["tuned", "default"] = "tuned"
    """On TPU, the options of bc2_jax/tpu/options.py for its generation, or the compiler's own choices."""
    loss_chunk: int = 1024
    """Tokens per device whose logits exist at one time in the loss."""

    def __post_init__(self) -> None:
        require_literals(self, "compute.")
        require_positive(self, "compute.", "attention_block", "loss_chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper section 2.4)."""

    peak_learning_rate: float = 2e-4
    """Learning rate at the end of warm-up (2e-4 for 7B, 1.5e-4 for 13B)."""
    min_learning_rate: float = 2e-5
    """Learning rate after decay_steps. The paper does not print it; a tenth of the peak is usual."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    decay_steps: int = 620_000
    """Step at which the cosine reaches min_learning_rate; independent of num_steps, so a run can stop and go on."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to norm weights."""
    clip_norm: float = 0.5
    """Largest global gradient norm."""
    moment_dtype: DType = "float32"
    """Storage dtype of both moments; bfloat16 halves their memory."""

    def __post_init__(self) -> None:
        require_literals(self, "optimizer.")
        require_positive(self, "optimizer.", "peak_learning_rate", "decay_steps", "eps", "clip_norm")
        for field in ("min_learning_rate", "warmup_steps", "weight_decay"):
            require(getattr(self, field) >= 0, f"optimizer.{field}", getattr(self, field), "it must be at least 0")
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, f"optimizer.{field}", getattr(self, field), "it must be in [0, 1)")
        require(
            self.min_learning_rate <= self.peak_learning_rate,
            "optimizer.min_learning_rate",
            self.min_learning_rate,
            f"it must be at most peak_learning_rate = {self.peak_learning_rate}",
        )
        require(
            self.warmup_steps < self.decay_steps,
            "optimizer.warmup_steps",
            self.warmup_steps,
            f"it must be less than decay_steps = {self.decay_steps}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Packed rows that are drawn together."""

    path: str
    """What tools/tokenize_corpus.py wrote: the whole corpus, the folder of a source in it, or one folder of rows."""
    weight: float = 1.0
    """Share of training tokens drawn from this source, relative to the other weights; 0 keeps it for a later stage."""
    quality_weights: tuple[float, ...] = ()
    """Factors for the quality buckets of the source, the worst first; empty for 1 each. Without them a bucket has the
    share of its rows times the mean sampling weight of its documents."""
    max_epochs: float | None = None
    """How often the run may read a row of this source; a run that would exceed it does not start. None: no limit."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, "data.sources.weight", self.weight, "it must be finite and at least 0")
        require(
            all(0 <= weight < math.inf for weight in self.quality_weights),
            "data.sources.quality_weights", self.quality_weights, "each must be finite and at least 0",
        )  # fmt: skip
        require(
            self.max_epochs is None or self.max_epochs > 0,
            "data.sources.max_epochs", self.max_epochs, "it must be positive, or None for no limit",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """From a number of training tokens on, other weights; each source goes on where it was.

    A run that is resumed with a stage added behind its step has read what it would have read with it from the start. A
    changed weight of a source, in contrast, changes the whole order: rows would be read again or never.
    """

    start_tokens: int
    """Tokens after which it begins, rounded up to a whole step."""
    weights: tuple[float, ...]
    """In place of the weight of each source, in their order."""

    def __post_init__(self) -> None:
        require_positive(self, "data.stages.", "start_tokens")
        require(
            all(0 <= weight < math.inf for weight in self.weights) and any(self.weights),
            "data.stages.weights", self.weights, "each must be finite and at least 0, and one positive",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Packed token rows and how they are drawn."""

    sources: tuple[SourceConfig, ...]
    """What is mixed; rows have sequence_length + 1 tokens."""
    stages: tuple[MixtureStage, ...] = ()
    """Changes of the mixture in the course of the run, in their order; before the first, the weights of the sources."""
    tokenizer: str
    """SentencePiece model the rows were made with."""
    sequence_length: int = 4096
    """Tokens a row, T; positions restart at each document."""
    global_batch_size: int = 1024
    """Rows per optimizer step over all devices and accumulation steps."""
    accumulation_steps: int = 1
    """Forward and backward passes per optimizer step; each token of the step has the same weight."""
    seed: int = 0
    """Seed of the row order."""
    max_bad_rows: int = 0
    """How many rows that can't be read each process goes on without, from its start on: padding takes their place, and
    each is named in the log. One more ends the run."""

    def __post_init__(self) -> None:
        require_positive(self, "data.", "sequence_length", "global_batch_size", "accumulation_steps")
        require(self.max_bad_rows >= 0, "data.max_bad_rows", self.max_bad_rows, "it must be at least 0")
        require(len(self.sources) > 0, "data.sources", self.sources, "at least one source is needed")
        require(
            any(source.weight for source in self.sources),
            "data.sources.weight", 0.0, "the run must begin with a source whose weight is positive",
        )  # fmt: skip
        for index, source in enumerate(self.sources):
            require(
                source.weight > 0 or any(stage.weights[index : index + 1] > (0,) for stage in self.stages),
                "data.sources.weight", source.weight, f"no stage reads {source.path!r} either; leave the source out",
            )  # fmt: skip
        for stage in self.stages:
            require(
                len(stage.weights) == len(self.sources),
                "data.stages.weights", stage.weights, f"it needs one for each of the {len(self.sources)} data.sources",
            )  # fmt: skip
        starts = self.stage_steps
        for before, after, stage in zip((0, *starts), starts, self.stages, strict=False):
            require(
                before < after,
                "data.stages.start_tokens", stage.start_tokens,
                f"it must be at least a step, {self.tokens_per_step} tokens, after the stage before",
            )  # fmt: skip
        require(
            self.global_batch_size % self.accumulation_steps == 0,
            "data.accumulation_steps",
            self.accumulation_steps,
            f"it must divide data.global_batch_size = {self.global_batch_size}; "
            f"legal values are {choices(divisors(self.global_batch_size))}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Step at which each of `stages` begins: its tokens, rounded up to whole steps."""
        return tuple(-(-stage.start_tokens // self.tokens_per_step) for stage in self.stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is written to WORKDIR/checkpoints; the last step is always saved."""

    save_every: int = 1000
    """Steps between checkpoints (the paper saves every 1000)."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep."""
    keep_every: int = 0
    """Keep for ever the checkpoints at multiples of this many steps; 0 keeps none for ever."""
    keep_every_tokens: int = 0
    """Save and keep for ever the first step at which another this many tokens have been trained on (the paper's
    intermediate checkpoints are 220 billion apart), and evaluate it; 0 keeps none."""

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint.", "save_every", "keep_last")
        require(
            self.keep_every_tokens >= 0, "checkpoint.keep_every_tokens", self.keep_every_tokens, "it must be at least 0"
        )
        require(
            self.keep_every >= 0 and self.keep_every % self.save_every == 0,
            "checkpoint.keep_every",
            self.keep_every,
            f"it must be a multiple of checkpoint.save_every = {self.save_every}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text written by the trained model when the run ends."""

    prompts: tuple[str, ...] = ()
    """Beginnings to continue."""
    max_new_tokens: int = 64
    """Longest continuation in tokens."""
    temperature: float = 0.3
    """Softmax temperature; 0 takes the most likely token."""
    top_k: int = 5
    """Sample among this many most likely tokens; 0 for all."""
    top_p: float = 0.85
    """Sample among the most likely tokens with this total probability."""
    repetition_penalty: float = 1.05
    """Factor against tokens that were already used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    name: str
    """Name of the run."""
    model: ModelConfig
    data: DataConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    sample: SampleConfig = SampleConfig()
    num_steps: int
    """Step at which the run ends."""
    workdir: str | None = None
    """Where checkpoints, metrics and pictures go; by default runs/NAME, or runs/NAME-2, ... if that holds a run."""
    init_from: str | None = None
    """Start from the parameters of this model, a PyTorch folder or a checkpoint, instead of random ones; the optimizer
    and the data start anew. Its architecture must be that of `model`."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest complete and undamaged checkpoint of the workdir, or start if there is none."""
    seed: int = 0
    """Seed of the initial parameters."""
    compilation_cache: str = "~/.cache/bc2_jax"
    """Folder of compiled programs, so that a restart or the same run again does not compile; empty for none."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl has every step."""
    eval_every: int = 1000
    """Steps between evaluations on the held-out rows; the last step is always evaluated."""
    eval_batches: int = 0
    """Batches of held-out rows per evaluation; 0 for all."""
    ngram_baselines: bool = False
    """Also print the validation cross entropy of unigram and bigram models of the training rows (holds V^2 counts)."""
    verify_resume_steps: int = 0
    """At the end, resume from this many steps before it, repeat them and compare the parameters bit for bit. 0: no."""
    export_hf: bool = False
    """At the end, also write the parameters in the released PyTorch layout to WORKDIR/hf."""
    profile_start: int = 0
    """Step at which a profiler trace starts; 0 for never."""
    profile_steps: int = 3
    """Steps in the profiler trace."""

    def __post_init__(self) -> None:
        require_literals(self, "")
        require_positive(self, "", "num_steps", "log_every", "eval_every", "profile_steps")
        for field in ("eval_batches", "verify_resume_steps", "profile_start", "seed"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "it must be at least 0")
        require("://" not in (self.workdir or ""), "workdir", self.workdir, "it must be a path of a file system")
        require(
            self.verify_resume_steps < self.num_steps,
            "verify_resume_steps",
            self.verify_resume_steps,
            f"it must be less than num_steps = {self.num_steps}",
        )
        require(
            self.data.sequence_length <= self.model.model_max_length,
            "data.sequence_length",
            self.data.sequence_length,
            f"it must be at most model.model_max_length = {self.model.model_max_length}",
        )
        require(
            self.checkpoint.keep_every_tokens == 0 or self.checkpoint.keep_every_tokens >= self.data.tokens_per_step,
            "checkpoint.keep_every_tokens",
            self.checkpoint.keep_every_tokens,
            f"it must be 0 or at least a step, {self.data.tokens_per_step} tokens",
        )
        self.health.check_checkpoints(self.checkpoint.save_every, self.checkpoint.keep_last)
        num_devices = self.mesh.num_cpu_devices * (self.distributed.num_processes or 1)
        mesh = self.mesh.resolve(num_devices) if num_devices else self.mesh
        check_divisible(self.model, mesh)
        length = self.data.sequence_length
        require(
            length % mesh.context == 0,
            "mesh.context",
            mesh.context,
            f"it must divide data.sequence_length = {length}; legal values are {choices(divisors(length))}",
        )
        field, shards = mesh.batch_shards
        shards = abs(shards)  # fsdp = -1 is not known yet
        rows = self.data.global_batch_size // self.data.accumulation_steps
        require(
            rows % shards == 0,
            "data.global_batch_size",
            self.data.global_batch_size,
            f"it must be a multiple of {field} * data.accumulation_steps = {shards * self.data.accumulation_steps}",
        )

    def resolve(self, num_devices: int) -> TrainConfig:
        """The same run with its mesh filled in for `num_devices`, everything that must divide checked."""
        return dataclasses.replace(self, mesh=self.mesh.resolve(num_devices))
