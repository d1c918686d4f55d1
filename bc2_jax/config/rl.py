"""Reinforcement learning from rewards: PPO with a critic, GRPO with groups of answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.config.finetune import TOKENIZER_OF_BASE, QuestionsConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.config.run import OptimizerConfig, RunConfig
from bc2_jax.validation import choices, divisors, require, require_literals, require_positive, require_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """An iteration: answers to some prompts are sampled, scored, and learned from by some updates. A step of the run
    is an iteration."""

    algorithm: Literal["ppo", "grpo"] = "ppo"
    """ppo: a critic estimates the value of every token (arXiv 1707.06347). grpo: the answers to a prompt are compared
    with each other (arXiv 2402.03300)."""
    prompts: tuple[str, ...] = ()
    """Files or folders of prompts: records with a prompt or messages, and whatever reward functions read."""
    reward_model: str | None = None
    """Run or checkpoint of a reward model; the critic starts from it. None: the reward functions alone count, and the
    critic starts from the actor."""
    reward_model_weight: float = 1.0
    """What the reward model's score is multiplied with."""
    reward_functions: tuple[str, ...] = ()
    """FILE.py:NAME or MODULE:NAME of functions reward(prompts, answers, rows) -> floats, which are added up."""
    prompts_per_step: int = 64
    """Different prompts of an iteration."""
    answers_per_prompt: int = 1
    """Answers that are sampled to each; the groups of grpo, which needs at least 2."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, and counted in the log."""
    max_new_tokens: int = 512
    """Longest answer in tokens, its eos included; a longer one is cut."""
    rollout_rows: int = 64
    """Answers that are sampled at one time; the next prompt takes the place of an answer that has ended."""
    rollout_gathers_once: bool = False
    """Gather the actor's weights once for a rollout, instead of at every step of decoding where the mesh cuts
    parameters (fsdp). Each device then holds all of them in the compute dtype, over mesh.tensor, while it lasts."""
    epochs: int = 1
    """How often the answers of an iteration are learned from."""
    minibatches: int = 4
    """Updates of an epoch, each from its share of the answers."""
    accumulation_steps: int = 1
    """Forward and backward passes of an update."""
    clip: float = 0.1
    """How far the ratio of new and old probability may lie from 1 before its gradient stops (paper: 0.1)."""
    value_clip: float | None = 0.2
    """How far a value may move from the critic's old one before its gradient stops; None does not clip."""
    kl_schedule: Literal["geometric", "linear", "constant", "adaptive"] = "geometric"
    """How the coefficient of the KL penalty goes from kl_start to kl_end. The paper gives both, not the way between.
    adaptive: a controller keeps the KL of an answer at kl_target."""
    kl_start: float = 0.2
    """Coefficient of the KL penalty at the first iteration (paper: 0.2). With ppo it is part of the rewards, with grpo
    of the loss."""
    kl_end: float = 0.005
    """Coefficient at iteration kl_steps and after (paper: 0.005)."""
    kl_steps: int = 350
    """Independent of num_steps, so that a run can stop and go on (paper: 350 iterations)."""
    kl_target: float = 6.0
    """Of kl_schedule adaptive: nats an answer."""
    kl_horizon: float = 10_000.0
    """Of kl_schedule adaptive: answers after which the coefficient has changed by about 20 % at most."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """The estimate of the KL that rewards are lowered by (`ppo.kl_estimates`); grpo's loss has k3."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Lambda of the advantages' estimate (arXiv 1506.02438): 1 trusts the rewards, 0 the critic."""
    critic_warmup_steps: int = 20
    """First iterations, in which the critic alone learns (paper: 20); of ppo."""
    critic_learning_rate: float | None = None
    """Peak learning rate of the critic; it has the actor's schedule. None: the actor's, as in the paper."""
    reduction: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """What is averaged in the loss of grpo: all tokens (arXiv 2503.14476), the means of the answers (arXiv
    2402.03300), or all tokens over the greatest length, and no division by the scores' deviation (arXiv 2503.20783)."""
    cut_penalty: float = 1.0
    """Taken from the score of an answer that was cut at max_new_tokens; 0 takes nothing. On by default: without it
    an answer that never ends costs nothing, and answers grow until all are cut."""
    bootstrap_cut: bool = False
    """Let the critic's value stand for what would have followed a cut answer, as if it could go on; of ppo. Off by
    default: max_new_tokens is a limit that the policy is to keep, not an accident."""
    normalize_rewards: bool = False
    """Shift and scale the scores by the running mean and deviation of all scores of the run."""
    patience: int = 10
    """Iterations in a row without any answer that ends, or without different scores to learn from, after which the run
    stops; 0 never stops for that."""
    keep_rollouts_every: int = 10
    """Iterations between those whose answers are written to WORKDIR/rollouts, and the first; 0 writes none."""

    def __post_init__(self) -> None:
        require_literals(self, "ppo.")
        require_types(self, "ppo.")
        require_positive(
            self, "ppo.", "prompts_per_step", "answers_per_prompt", "max_prompt_tokens", "max_new_tokens",
            "rollout_rows", "epochs", "minibatches", "accumulation_steps", "clip", "kl_start", "kl_end", "kl_steps",
            "kl_target", "kl_horizon",
        )  # fmt: skip
        for field in ("critic_warmup_steps", "cut_penalty", "patience", "keep_rollouts_every"):
            require(getattr(self, field) >= 0, f"ppo.{field}", getattr(self, field), "it must be at least 0")
        for field in ("gamma", "lam"):
            require(0 <= getattr(self, field) <= 1, f"ppo.{field}", getattr(self, field), "it must be in [0, 1]")
        require(self.clip < 1, "ppo.clip", self.clip, "it must be below 1")
        for field in ("value_clip", "critic_learning_rate"):
            value = getattr(self, field)
            require(value is None or value > 0, f"ppo.{field}", value, "it must be positive, or None")
        for field in ("prompts", "reward_functions"):
            for index, value in enumerate(getattr(self, field)):
                require(isinstance(value, str) and bool(value), f"ppo.{field}.{index}", value, "it must be a name")
        is_grpo = self.algorithm == "grpo"
        require(
            not is_grpo or self.answers_per_prompt >= 2, "ppo.answers_per_prompt", self.answers_per_prompt,
            "grpo compares the answers to a prompt: it must be at least 2",
        )  # fmt: skip
        require(
            not (is_grpo and self.bootstrap_cut), "ppo.bootstrap_cut", self.bootstrap_cut,
            "grpo has no critic: it must be False",
        )  # fmt: skip
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
        """Of an iteration."""
        return self.prompts_per_step * self.answers_per_prompt

    @property
    def updates(self) -> int:
        """Of an iteration."""
        return self.epochs * self.minibatches

    @property
    def micro_rows(self) -> int:
        """Answers of a forward and backward pass."""
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
    """Reinforcement learning of a chat model, `init_from`, which is the reference too. num_steps counts iterations."""

    ppo: PPOConfig = PPOConfig()
    lora: LoraConfig = LoraConfig()
    """Adapters of the actor, and of the critic, beside frozen models; dropout must be 0."""
    questions: QuestionsConfig = QuestionsConfig(path=None)
    tokenizer: str = TOKENIZER_OF_BASE
    """SentencePiece model of the chat model; by default found beside it."""

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
        shards = abs(shards)  # fsdp = -1 is not known yet
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
            ppo.critic_warmup_steps, f"it must be less than num_steps = {self.num_steps}: the actor would never learn",
        )  # fmt: skip
        require(
            self.questions.path != "auto", "questions.path", "auto",
            "there are no rows beside which they could be: it must be a file, or None",
        )  # fmt: skip
        require(
            self.lora.dropout == 0, "lora.dropout", self.lora.dropout,
            "it must be 0: the probabilities of a token before and after an update must differ by the update alone",
        )  # fmt: skip
        require(
            self.health.spike_deviations == 0, "health.spike_deviations", self.health.spike_deviations,
            "it must be 0: the loss of policy gradients does not tell how good a policy is, and jumps",
        )  # fmt: skip

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """The actor's, with the critic's learning rate."""
        rate, mine = self.ppo.critic_learning_rate, self.optimizer
        if rate is None:
            return mine
        low = mine.min_learning_rate / mine.peak_learning_rate
        return dataclasses.replace(mine, peak_learning_rate=rate, min_learning_rate=rate * low)
