"""Config of a run: optimizer, checkpoints, samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self

from bc2_jax.config.compute import ComputeConfig
from bc2_jax.config.data import DataConfig
from bc2_jax.config.distributed import DistributedConfig
from bc2_jax.config.evaluate import EvaluateConfig
from bc2_jax.config.health import HealthConfig
from bc2_jax.config.mesh import MeshConfig, check_divisible
from bc2_jax.config.model import ModelConfig
from bc2_jax.validation import check_fields, choices, divisors, require, require_at_most, require_local


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper section 2.4)."""

    peak_learning_rate: float = 2e-4
    """Learning rate at the end of warm-up (2e-4 for 7B, 1.5e-4 for 13B)."""
    min_learning_rate: float = 2e-5
    """Learning rate from decay_steps on; not in the paper, usually a tenth of the peak."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    decay_steps: int = 620_000
    """Step at which the cosine reaches min_learning_rate; independent of num_steps, so that a run can be extended."""
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
    moment_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of both moments: 8, 4 or about 2 bytes a parameter. int8 has one fp32 scale a row and needs
    stochastic_rounding."""
    stochastic_rounding: bool = False
    """Round stored moments up or down at random, right on average; to nearest, bf16 moments stop decaying once
    1 - b2 is below .004."""

    def __post_init__(self) -> None:
        positive = ("peak_learning_rate", "decay_steps", "eps", "clip_norm")
        check_fields(self, "optimizer.", positive, ("min_learning_rate", "warmup_steps", "weight_decay"))
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, f"optimizer.{field}", getattr(self, field), "it must be in [0, 1)")
        if self.moment_dtype == "int8" or self.stochastic_rounding:
            legal = f"it must be {self.moment_dtype == 'int8'} with moment_dtype = {self.moment_dtype}"
            fits = self.stochastic_rounding == (self.moment_dtype != "float32")
            require(fits, "optimizer.stochastic_rounding", self.stochastic_rounding, legal)
        low, high = self.min_learning_rate, self.peak_learning_rate
        require(low <= high, "optimizer.min_learning_rate", low, f"it must be at most peak_learning_rate = {high}")
        warmup, decay = self.warmup_steps, self.decay_steps
        require(warmup < decay, "optimizer.warmup_steps", warmup, f"it must be less than decay_steps = {decay}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints in WORKDIR/checkpoints; the last step is always saved."""

    save_every: int = 1000
    """Steps between checkpoints (the paper saves every 1000)."""
    keep_last: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Never delete checkpoints at multiples of this many steps; 0: none."""
    keep_every_tokens: int = 0
    """Save, evaluate and never delete the first step after each multiple of this many training tokens (the paper's
    checkpoints are 220 billion apart); 0: none."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.", ("save_every", "keep_last"), ("keep_every", "keep_every_tokens"))
        require(
            self.keep_every % self.save_every == 0, "checkpoint.keep_every", self.keep_every,
            f"it must be a multiple of checkpoint.save_every = {self.save_every}",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text samples at the end of a run."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue."""
    max_new_tokens: int = 64
    """Longest continuation in tokens."""
    temperature: float = 0.3
    """Softmax temperature; 0: greedy."""
    top_k: int = 5
    """Sample from this many most likely tokens; 0: all."""
    top_p: float = 0.85
    """Sample from the most likely tokens with this total probability."""
    repetition_penalty: float = 1.05
    """Factor against tokens already used; 1: none."""

    def __post_init__(self) -> None:
        check_fields(self, "sample.", ("max_new_tokens", "repetition_penalty"), ("temperature", "top_k"))
        require(0 < self.top_p <= 1, "sample.top_p", self.top_p, "it must be in (0, 1]")
        for index, prompt in enumerate(self.prompts):
            require(bool(prompt), f"sample.prompts.{index}", prompt, "it must not be empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of all kinds of run."""

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
    """Last step of the run."""
    workdir: str | None = None
    """Folder of checkpoints, metrics and pictures; by default runs/NAME, or runs/NAME-2, ... if that holds a run."""
    init_from: str | None = None
    """Model to start from, a PyTorch folder or a checkpoint with the architecture of `model`; optimizer and data start
    from scratch. None: random parameters."""
    allow_other_tokenizer: bool = False
    """Allow to resume, or to start from `init_from`, with another tokenizer than the model was trained with."""
    resume: Literal["never", "auto"] = "never"
    """auto: resume from the newest intact checkpoint of the workdir, or start if there is none."""
    seed: int = 0
    """Seed of the initial parameters."""
    compilation_cache: str = "~/.cache/bc2_jax"
    """Cache folder of compiled programs, for restarts; empty: none."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl has all steps."""
    wandb_project: str | None = None
    """Project of Weights & Biases to send metrics to as well; a resumed run continues there (extra `wandb`)."""
    eval_every: int = 1000
    """Steps between evaluations on the held-out rows; the last step is always evaluated."""
    eval_batches: int = 0
    """Batches of held-out rows per evaluation; 0: all."""
    verify_resume_steps: int = 0
    """At the end, repeat this many last steps from a checkpoint and compare the parameters bit for bit; 0: none."""
    profile_start: int = 0
    """First step of a profiler trace; 0: none."""
    profile_steps: int = 3
    """Steps in the profiler trace."""
    export_hf: bool = False
    """At the end, also export the model in the released PyTorch layout to WORKDIR/hf."""

    def __post_init__(self) -> None:
        positive = ("num_steps", "log_every", "eval_every", "profile_steps")
        check_fields(self, "", positive, ("eval_batches", "verify_resume_steps", "profile_start", "seed"))
        require_at_most(self, "", seed=2**32 - 1)  # JAX would drop higher bits
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
        legal = f"0 or at least a step, {tokens} tokens" if tokens else "0, because this kind of run has no token count"
        require(every == 0 or every >= tokens > 0, "checkpoint.keep_every_tokens", every, f"it must be {legal}")
        self.evaluate.check_every(self.eval_every)
        self.health.check_checkpoints(self.checkpoint.save_every, self.checkpoint.keep_last)
        check_divisible(self.model, self.known_mesh)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step; 0 for kinds of run that don't count tokens."""
        return 0

    @property
    def known_mesh(self) -> MeshConfig:
        """The mesh without devices; resolved only if they are simulated."""
        num_devices = self.mesh.num_cpu_devices * (self.distributed.num_processes or 1)
        return self.mesh.resolve(num_devices) if num_devices else self.mesh

    def resolve(self, num_devices: int) -> Self:
        """The config with its mesh resolved for `num_devices`, and validated."""
        return dataclasses.replace(self, mesh=self.mesh.resolve(num_devices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Pre-training on packed rows."""

    row_kinds: ClassVar[tuple[str, ...]] = ("text", "chat")
    """Kinds of rows that this run can train on."""
    data: DataConfig
    sample: SampleConfig = SampleConfig()
    ngram_baselines: bool = False
    """Also print validation cross entropies of unigram and bigram models of the training rows (V^2 counts)."""

    def __post_init__(self) -> None:
        require(
            self.data.sequence_length <= self.model.model_max_length, "data.sequence_length", self.data.sequence_length,
            f"it must be at most model.model_max_length = {self.model.model_max_length}",
        )  # fmt: skip
        super().__post_init__()
        mesh, length = self.known_mesh, self.data.sequence_length
        require(
            length % mesh.context == 0, "mesh.context", mesh.context,
            f"it must divide data.sequence_length = {length}; legal values are {choices(divisors(length))}",
        )  # fmt: skip
        field, shards = mesh.batch_shards
        shards = abs(shards)  # negative if fsdp = -1
        rows = self.data.global_batch_size // self.data.accumulation_steps
        require(
            rows % shards == 0, "data.global_batch_size", self.data.global_batch_size,
            f"it must be a multiple of {field} * data.accumulation_steps = {shards * self.data.accumulation_steps}",
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step
