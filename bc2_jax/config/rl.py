"""Reinforcement learning: PPO with a critic, GRPO with groups of answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.config.finetune import TOKENIZER_OF_BASE, QuestionsConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.config.run import OptimizerConfig, RunConfig
from bc2_jax.validation import check_fields, choices, divisors, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """An iteration, which is a step of the run: answers to prompts are sampled, scored and learned from."""

    algorithm: Literal["ppo", "grpo"] = "ppo"
    """ppo: a critic estimates the value of every token (arXiv 1707.06347). grpo: compares the answers to a prompt
    (arXiv 2402.03300)."""
    prompts: tuple[str, ...] = ()
    """Files or folders of records with a prompt or messages, and fields for reward functions."""
    reward_model: str | None = None
    """Run or checkpoint of a reward model, from which the critic starts. None: only reward functions count, and the
    critic starts from the actor."""
    reward_model_weight: float = 1.0
    """Factor of the reward model's score."""
    reward_functions: tuple[str, ...] = ()
    """Functions FILE.py:NAME or MODULE:NAME, reward(prompts, answers, rows) -> floats, which are added up."""
    prompts_per_step: int = 64
    """Prompts of an iteration."""
    answers_per_prompt: int = 1
    """Answers sampled to each prompt, at least 2 for grpo."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens; longer ones are left out and counted in the log."""
    max_new_tokens: int = 512
    """Longest answer in tokens, eos included; a longer one is cut."""
    rollout_rows: int = 64
    """Answers sampled at a time; a finished answer is replaced by the next prompt."""
    rollout_gathers_once: bool = False
    """Gather the actor's weights, sharded by fsdp, once for a rollout instead of at every decoding step. Each device
    then holds all of them during the rollout, in the compute dtype, divided by mesh.tensor."""
    epochs: int = 1
    """Passes over the answers of an iteration."""
    minibatches: int = 4
    """Updates of an epoch, each from its part of the answers."""
    accumulation_steps: int = 1
    """Forward and backward passes (micro-batches) of an update."""
    clip: float = 0.1
    """Distance of the ratio of new and old probability from 1 beyond which the gradient is clipped (paper: 0.1)."""
    value_clip: float | None = 0.2
    """Change of a value beyond which its gradient is clipped; None: no clipping."""
    kl_schedule: Literal["geometric", "linear", "constant", "adaptive"] = "geometric"
    """Schedule of the KL coefficient from kl_start to kl_end, which the paper does not give. adaptive: a controller
    keeps the KL of an answer at kl_target."""
    kl_start: float = 0.2
    """KL coefficient at the first iteration (paper: 0.2). The penalty is in the rewards of ppo, in the loss of grpo."""
    kl_end: float = 0.005
    """KL coefficient from iteration kl_steps on (paper: 0.005)."""
    kl_steps: int = 350
    """Iterations of the KL schedule (paper: 350), independent of num_steps, so that a run can be extended."""
    kl_target: float = 6.0
    """Target KL of an answer in nats, for kl_schedule adaptive."""
    kl_horizon: float = 10_000.0
    """Answers within which the coefficient changes by at most about 20 %, for kl_schedule adaptive."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty in the rewards of ppo (docs/rl.md); the loss of grpo uses k3."""
    gamma: float = 1.0
    """Discount factor of rewards."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation (arXiv 1506.02438): 1 relies on rewards, 0 on the critic."""
    critic_warmup_steps: int = 20
    """First iterations, in which only the critic of ppo learns (paper: 20)."""
    critic_learning_rate: float | None = None
    """Peak learning rate of the critic, with the actor's schedule. None: the actor's, as in the paper."""
    reduction: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Average in the loss of grpo. dapo: over all tokens (arXiv 2503.14476); grpo: over means of answers (arXiv
    2402.03300); dr_grpo: sum over the longest length, scores not divided by their deviation (arXiv 2503.20783)."""
    cut_penalty: float = 1.0
    """Subtracted from the score of an answer cut at max_new_tokens. On by default: otherwise endless answers cost
    nothing and answers grow until all are cut."""
    bootstrap_cut: bool = False
    """Use the critic's value for the missing rest of a cut answer (ppo). Off by default: max_new_tokens is a limit that
    the policy should learn to keep."""
    normalize_rewards: bool = False
    """Normalize scores by the running mean and standard deviation of the run."""
    patience: int = 10
    """Consecutive iterations without an ended answer, or with equal scores, after which the run stops; 0: never."""
    keep_rollouts_every: int = 10
    """Iterations between answers written to WORKDIR/rollouts, from the first one on; 0: none."""

    def __post_init__(self) -> None:
        positive = (
            "prompts_per_step", "answers_per_prompt", "max_prompt_tokens", "max_new_tokens", "rollout_rows", "epochs",
            "minibatches", "accumulation_steps", "clip", "kl_start", "kl_end", "kl_steps", "kl_target", "kl_horizon",
        )  # fmt: skip
        check_fields(
            self, "ppo.", positive, ("critic_warmup_steps", "cut_penalty", "patience", "keep_rollouts_every")
        )  # fmt: skip
        for field in ("gamma", "lam"):
            require(0 <= getattr(self, field) <= 1, f"ppo.{field}", getattr(self, field), "it must be in [0, 1]")
        require(self.clip < 1, "ppo.clip", self.clip, "it must be below 1")
        for field in ("value_clip", "critic_learning_rate"):
            value = getattr(self, field)
            require(value is None or value > 0, f"ppo.{field}", value, "it must be positive, or None")
        for field in ("prompts", "reward_functions"):
            for index, value in enumerate(getattr(self, field)):
                require(isinstance(value, str) and bool(value), f"ppo.{field}.{index}", value, "it must be a name")
        if not self.has_critic:
            count, legal = self.answers_per_prompt, "it must be at least 2: grpo compares the answers to a prompt"
            require(count >= 2, "ppo.answers_per_prompt", count, legal)
            legal = "it must be False: grpo has no critic"
            require(not self.bootstrap_cut, "ppo.bootstrap_cut", self.bootstrap_cut, legal)
        answers = self.answers
        require(
            answers % self.minibatches == 0, "ppo.minibatches", self.minibatches,
            f"it must divide ppo.prompts_per_step * ppo.answers_per_prompt = {answers}; legal values are "
            f"{choices(divisors(answers))}",
        )  # fmt: skip
        rows = answers // self.minibatches
        require(
            rows % self.accumulation_steps == 0, "ppo.accumulation_steps", self.accumulation_steps,
            f"it must divide the {rows} answers of a minibatch; legal values are {choices(divisors(rows))}",
        )  # fmt: skip

    @property
    def answers(self) -> int:
        """Answers of an iteration."""
        return self.prompts_per_step * self.answers_per_prompt

    @property
    def updates(self) -> int:
        """Updates of an iteration."""
        return self.epochs * self.minibatches

    @property
    def micro_rows(self) -> int:
        """Answers of a micro-batch."""
        return self.answers // (self.minibatches * self.accumulation_steps)

    @property
    def row_tokens(self) -> int:
        """Length of a row: one prompt with one answer."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def has_critic(self) -> bool:
        return self.algorithm == "ppo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig):
    """Reinforcement learning of the chat model `init_from`, which is also the reference. num_steps counts
    iterations."""

    ppo: PPOConfig = PPOConfig()
    lora: LoraConfig = LoraConfig()
    """Adapters of actor and critic beside frozen models; dropout must be 0."""
    questions: QuestionsConfig = QuestionsConfig(path=None)
    tokenizer: str = TOKENIZER_OF_BASE
    """SentencePiece model; by default that of the chat model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ppo, mesh, length = self.ppo, self.known_mesh, self.ppo.row_tokens
        require(
            length <= self.model.model_max_length, "ppo.max_new_tokens", ppo.max_new_tokens,
            f"with ppo.max_prompt_tokens = {ppo.max_prompt_tokens} it must be at most model.model_max_length = "
            f"{self.model.model_max_length}",
        )  # fmt: skip
        require(
            length % mesh.context == 0, "mesh.context", mesh.context,
            f"it must divide ppo.max_prompt_tokens + ppo.max_new_tokens = {length}; legal values are "
            f"{choices(divisors(length))}",
        )  # fmt: skip
        field, shards = mesh.batch_shards
        shards = abs(shards)  # negative if fsdp = -1
        require(
            ppo.micro_rows % shards == 0, "ppo.prompts_per_step", ppo.prompts_per_step,
            f"with ppo.answers_per_prompt = {ppo.answers_per_prompt}, the answers must be a multiple of {field} * "
            f"ppo.minibatches * ppo.accumulation_steps = {shards * ppo.minibatches * ppo.accumulation_steps}",
        )  # fmt: skip
        require(
            ppo.rollout_rows % shards == 0, "ppo.rollout_rows", ppo.rollout_rows,
            f"it must be a multiple of {field} = {shards}",
        )  # fmt: skip
        require(
            not ppo.has_critic or ppo.critic_warmup_steps < self.num_steps, "ppo.critic_warmup_steps",
            ppo.critic_warmup_steps, f"it must be less than num_steps = {self.num_steps}, or the actor never learns",
        )  # fmt: skip
        legal = "it must be a file, or None: there are no rows"
        require(self.questions.path != "auto", "questions.path", "auto", legal)
        legal = "it must be 0: probabilities before and after an update must differ only by the update"
        require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, legal)
        deviations = self.health.spike_deviations
        legal = "it must be 0: the loss of policy gradients does not measure the policy, and jumps"
        require(deviations == 0, "health.spike_deviations", deviations, legal)

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """The actor's optimizer with the critic's learning rate."""
        rate, mine = self.ppo.critic_learning_rate, self.optimizer
        if rate is None:
            return mine
        low = mine.min_learning_rate / mine.peak_learning_rate
        return dataclasses.replace(mine, peak_learning_rate=rate, min_learning_rate=rate * low)
