"""A run: how the model is computed and trained, on which data, and what is written."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self

from bc2_jax.config.data import DataConfig
from bc2_jax.config.distributed import DistributedConfig
from bc2_jax.config.evaluate import EvaluateConfig
from bc2_jax.config.health import HealthConfig
from bc2_jax.config.mesh import MeshConfig, check_divisible
from bc2_jax.config.model import ModelConfig
from bc2_jax.validation import (
    choices,
    divisors,
    require,
    require_at_most,
    require_literals,
    require_local,
    require_positive,
    require_types,
)

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
        require_types(self, "compute.")
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
        require_types(self, "optimizer.")
        require_positive(self, "optimizer.", "peak_learning_rate", "decay_steps", "eps", "clip_norm")
        for field in ("min_learning_rate", "warmup_steps", "weight_decay"):
            require(getattr(self, field) >= 0, f"optimizer.{field}", getattr(self, field), "it must be at least 0")
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, f"optimizer.{field}", getattr(self, field), "it must be in [0, 1)")
        require(
            self.min_learning_rate <= self.peak_learning_rate, "optimizer.min_learning_rate", self.min_learning_rate,
            f"it must be at most peak_learning_rate = {self.peak_learning_rate}",
        )  # fmt: skip
        require(
            self.warmup_steps < self.decay_steps, "optimizer.warmup_steps", self.warmup_steps,
            f"it must be less than decay_steps = {self.decay_steps}",
        )  # fmt: skip


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
        require_types(self, "checkpoint.")
        require_positive(self, "checkpoint.", "save_every", "keep_last")
        require(
            self.keep_every_tokens >= 0, "checkpoint.keep_every_tokens", self.keep_every_tokens, "it must be at least 0"
        )
        require(
            self.keep_every >= 0 and self.keep_every % self.save_every == 0, "checkpoint.keep_every", self.keep_every,
            f"it must be a multiple of checkpoint.save_every = {self.save_every}",
        )  # fmt: skip


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

    def __post_init__(self) -> None:
        require_types(self, "sample.")
        require_positive(self, "sample.", "max_new_tokens", "repetition_penalty")
        for field in ("temperature", "top_k"):
            require(getattr(self, field) >= 0, f"sample.{field}", getattr(self, field), "it must be at least 0")
        require(0 < self.top_p <= 1, "sample.top_p", self.top_p, "it must be in (0, 1]")
        for index, prompt in enumerate(self.prompts):
            require(bool(prompt), f"sample.prompts.{index}", prompt, "it must not be empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of run has."""

    name: str
    """Name of the run."""
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    num_steps: int
    """Step at which the run ends."""
    workdir: str | None = None
    """Where checkpoints, metrics and pictures go; by default runs/NAME, or runs/NAME-2, ... if that holds a run."""
    init_from: str | None = None
    """Start from the parameters of this model, a PyTorch folder or a checkpoint, instead of random ones; the optimizer
    and the data start again. Its architecture must be that of `model`."""
    allow_other_tokenizer: bool = False
    """Resume, or start from `init_from`, with another tokenizer than the model was trained with."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest complete and undamaged checkpoint of the workdir, or start if there is none."""
    seed: int = 0
    """Seed of the initial parameters."""
    compilation_cache: str = "~/.cache/bc2_jax"
    """Folder of compiled programs, so that a restart or the same run again does not compile; empty for none."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl has every step."""
    wandb_project: str | None = None
    """Project of Weights & Biases to send metrics to as well; a resumed run continues there (extra `wandb`)."""
    eval_every: int = 1000
    """Steps between evaluations on the held-out rows; the last step is always evaluated."""
    eval_batches: int = 0
    """Batches of held-out rows per evaluation; 0 for all."""
    verify_resume_steps: int = 0
    """At the end, resume from this many steps before it, repeat them and compare the parameters bit for bit. 0: no."""
    profile_start: int = 0
    """Step at which a profiler trace starts; 0 for never."""
    profile_steps: int = 3
    """Steps in the profiler trace."""
    export_hf: bool = False
    """At the end, also write the trained model in the released PyTorch layout to WORKDIR/hf."""

    def __post_init__(self) -> None:
        require_literals(self, "")
        require_types(self, "")
        require_positive(self, "", "num_steps", "log_every", "eval_every", "profile_steps")
        for field in ("eval_batches", "verify_resume_steps", "profile_start", "seed"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "it must be at least 0")
        require_at_most(self, "", seed=2**32 - 1)  # JAX would take a larger one for a smaller
        for field in ("workdir", "init_from"):
            require_local(field, getattr(self, field) or "")
        require(
            self.verify_resume_steps < self.num_steps, "verify_resume_steps", self.verify_resume_steps,
            f"it must be less than num_steps = {self.num_steps}",
        )  # fmt: skip
        last = self.profile_start + self.profile_steps - 1
        require(
            self.profile_start == 0 or last <= self.num_steps, "profile_start", self.profile_start,
            f"the trace of profile_steps = {self.profile_steps} must end by num_steps = {self.num_steps}",
        )  # fmt: skip
        tokens, every = self.tokens_per_step, self.checkpoint.keep_every_tokens
        legal = f"0 or at least a step, {tokens} tokens" if tokens else "0, as this kind of run does not count tokens"
        require(every == 0 or every >= tokens > 0, "checkpoint.keep_every_tokens", every, f"it must be {legal}")
        self.evaluate.check_every(self.eval_every)
        self.health.check_checkpoints(self.checkpoint.save_every, self.checkpoint.keep_last)
        check_divisible(self.model, self.known_mesh)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an update is made of; 0 if this kind of run is not counted in tokens."""
        return 0

    @property
    def known_mesh(self) -> MeshConfig:
        """The mesh as far as it is known without devices: in whole where they are simulated."""
        num_devices = self.mesh.num_cpu_devices * (self.distributed.num_processes or 1)
        return self.mesh.resolve(num_devices) if num_devices else self.mesh

    def resolve(self, num_devices: int) -> Self:
        """The same run with its mesh filled in for `num_devices`, everything that must divide checked."""
        return dataclasses.replace(self, mesh=self.mesh.resolve(num_devices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Pre-training: a run on packed rows of text."""

    row_kinds: ClassVar[tuple[str, ...]] = ("text", "chat")
    """Kinds of rows that it can train on."""
    data: DataConfig
    sample: SampleConfig = SampleConfig()
    ngram_baselines: bool = False
    """Also print the validation cross entropy of unigram and bigram models of the training rows (holds V^2 counts)."""

    def __post_init__(self) -> None:
        require(
            self.data.sequence_length <= self.model.model_max_length, "data.sequence_length", self.data.sequence_length,
            f"it must be at most model.model_max_length = {self.model.model_max_length}",
        )  # fmt: skip
        super().__post_init__()
        mesh, length = self.known_mesh, self.data.sequence_length
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
            rows % shards == 0, "data.global_batch_size", self.data.global_batch_size,
            f"it must be a multiple of {field} * data.accumulation_steps = {shards * self.data.accumulation_steps}",
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step
