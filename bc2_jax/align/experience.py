"""The batches of reinforcement learning: rollouts are sampled, scored and laid out for the updates of an iteration.

An iteration depends only on the seed, its number and the trained parameters. Checkpoints are between two iterations: an
interrupted one is repeated from its start with the same bits, so no part of a rollout is saved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from bc2_jax.align import shaping
from bc2_jax.align.actor_critic import Held, Models, Programs
from bc2_jax.align.experience_checks import Checks
from bc2_jax.align.formats import write_records
from bc2_jax.align.prompts import Prompt, PromptSet, prompts_of
from bc2_jax.align.reward_functions import RewardFunction
from bc2_jax.config import RLConfig
from bc2_jax.data.batch import FIELDS, IGNORED, Batch, Rows
from bc2_jax.data.row_batches import BATCHES_KEPT, Stretch, merge, row_of_step, save_batch
from bc2_jax.infer import engine
from bc2_jax.infer.generate import Continuation
from bc2_jax.infer.refill import RefillStats, Stopped, continue_many
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import spec, to_host
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.job import BatchError, TrainState
from bc2_jax.train.loop import Start

FOLDER = "rollouts"
"""Folder in the workdir, with step_N.jsonl of answers and their scores."""


class Answers(NamedTuple):
    """The N answers of an iteration; those to one prompt are consecutive."""

    prompts: list[Prompt]
    texts: list[str]
    rows: Rows
    """FIELDS, int32 [N, T]: prompt and answer, left-aligned; labels only of the answer, its eos included."""
    sampled: np.ndarray
    """fp32 [N, T]: the sampler's log-probabilities of the labels."""
    last: np.ndarray
    """int [N]: position of the last token."""
    tokens: np.ndarray
    """int [N]: length of the answer."""
    cut: np.ndarray
    """bool [N]: not ended by eos."""

    @property
    def mask(self) -> np.ndarray:
        """bool [N, T]: whether the label is a token of the answer."""
        return self.rows["labels"] != IGNORED


def lay_out(
    prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], found: Sequence[Continuation], texts: list[str],
    length: int,
) -> Answers:  # fmt: skip
    """Lays out the answers `found` to prompts with tokens `ids` as rows of `length`."""
    shape = len(ids), length
    rows = {name: np.zeros(shape, np.int32) for name in FIELDS}
    rows["labels"][:] = IGNORED
    sampled = np.zeros(shape, np.float32)
    for row, (prompt, answer) in enumerate(zip(ids, found, strict=True)):
        tokens, start = [*prompt, *answer.tokens], len(prompt) - 1
        stop = start + len(answer.tokens)
        rows["input_ids"][row, : len(tokens)] = tokens
        rows["labels"][row, start:stop] = answer.tokens
        rows["segment_ids"][row, : len(tokens)] = 1
        rows["positions"][row, : len(tokens)] = np.arange(len(tokens))
        sampled[row, start:stop] = answer.log_probs
    tokens_N = np.array([len(answer.tokens) for answer in found])
    last_N = np.array([len(prompt) for prompt in ids]) + tokens_N - 1
    cut_N = np.array([answer.reason != "eos" for answer in found])
    return Answers(list(prompts), texts, rows, sampled, last_N, tokens_N, cut_N)


class Scores(NamedTuple):
    """Scores of the answers of an iteration, fp32 [N]."""

    parts: dict[str, np.ndarray]
    """By source: "model" (the reward model), names of reward functions, "cut"."""
    total: np.ndarray


class Rollouts:
    """`train.job.Batches`: the batch of a step is the experience for all updates of an iteration."""

    def __init__(
        self, config: RLConfig, start: Start, prompts: PromptSet, tokenizer: Tokenizer, models: Models,
        programs: Programs, held: Held, frozen: Params, functions: Sequence[RewardFunction],
    ):  # fmt: skip
        self._config, self._start, self._prompts, self._tokenizer = config, start, prompts, tokenizer
        self._models, self._programs, self._held, self._frozen = models, programs, held, frozen
        self._functions = short_names(functions)
        self._checks = Checks(config, start.say)
        self._scores = shaping.RunningScores()
        self._coefficient = config.ppo.kl_start
        self._windows: list[tuple[int, int]] = []
        self._next = 0
        self._metrics: dict[int, dict[str, float]] = {}
        self._recent: dict[int, Rows] = {}

    # ---------------------------------------------------------------------------------------------------- Batches

    def next(self, step: int, state: TrainState) -> Batch | None:
        try:
            with jax.transfer_guard("allow"):  # the loop forbids implicit transfers
                return self._make(step, state)
        except Stopped:
            return None
        except (ValueError, ArithmeticError) as error:  # of a reward or a check, on every process
            raise BatchError(str(error)) from error

    def position(self) -> dict[str, Any]:
        """The next iteration, the skipped ones, and running values."""
        return {
            "iteration": self._next, "skipped_iterations": [list(window) for window in self._windows],
            "kl_coefficient": self._coefficient, "scores": self._scores.state(), "checks": self._checks.state(),
        }  # fmt: skip

    def seek(self, position: dict[str, Any]) -> None:
        self._next, self._coefficient = position["iteration"], position["kl_coefficient"]
        self._windows = merge([*self._windows, *((first, stop) for first, stop in position["skipped_iterations"])])
        self._scores = shaping.RunningScores(*position["scores"])
        self._checks = self._checks.with_state(position["checks"])
        self._recent.clear()

    def skip(self, first: int, last: int) -> dict[str, Any]:
        window = self._iteration(first), self._iteration(last) + 1
        self._windows = merge([*self._windows, window])
        return {"skipped_iterations": list(window), "rows": (last - first + 1) * self._config.ppo.answers}

    def metrics(self, step: int) -> dict[str, float]:
        return dict(self._metrics.get(step, {}))

    def save(self, step: int, folder: Path, about: dict[str, Any]) -> Path | None:
        """Writes FOLDER/bad_batch_step_STEP.npz, the answers with their experience, on the first process."""
        if step not in self._recent or jax.process_index() != 0:
            return None
        return save_batch(folder, step, self._recent[step], about)

    def close(self) -> None:
        self._recent.clear()

    def _iteration(self, step: int) -> int:
        return row_of_step(step, [Stretch(1, 0, 1)], self._windows)

    # -------------------------------------------------------------------------------------------------- experience

    def _make(self, step: int, state: TrainState) -> Batch:
        """The batch of a step. The object only changes at the very end, as the run may be stopped before."""
        ppo, clock = self._config.ppo, time.perf_counter
        begin = clock()
        iteration = self._iteration(step)
        answers, stats = self._roll_out(iteration, step, state)
        sampled = clock()
        placed = self._place_rows(answers.rows)
        scores = self._score(answers, placed)
        running = self._scores.updated(scores.total)
        learned = running.normalized(scores.total) if ppo.normalize_rewards else scores.total
        self._check_progress(f"the scores of step {step}")
        found = self._forward(state, placed)
        coefficient = shaping.coefficient_of(ppo, iteration, self._coefficient)
        fields, shaped = shaping.shape(ppo, answers.mask, answers.last, answers.cut, found, learned, coefficient)
        metrics = shaped | shaping.measure(ppo, answers, scores, found) | _rollout_metrics(stats, answers)
        metrics["kl_coefficient"] = coefficient
        metrics |= {"rollout_seconds": sampled - begin, "scoring_seconds": clock() - sampled, "iteration": iteration}
        self._check_progress(f"the log-probabilities of step {step}")
        checks = self._checks.updated(step, metrics)
        # From here on the run is not stopped until the batch is made.
        self._checks, self._scores, self._next = checks, running, iteration + 1
        self._coefficient = shaping.adapt(ppo, coefficient, metrics["kl_per_answer"])
        self._metrics[step] = {name: float(value) for name, value in metrics.items()}
        self._recent[step] = answers.rows | fields
        for kept in (self._metrics, self._recent):
            for old in [s for s in kept if s <= step - BATCHES_KEPT]:
                del kept[old]
        self._write(step, answers, scores)
        return self._lay_out_updates(answers.rows | fields, iteration, coefficient)

    def _check_progress(self, done: str) -> None:
        if not self._start.progress(done):
            raise Stopped

    def _roll_out(self, iteration: int, step: int, state: TrainState) -> tuple[Answers, RefillStats]:
        """Samples the answers of the actor, whose copy for decoding exists only here."""
        config, ppo = self._config, self._config.ppo
        which = prompts_of(iteration, len(self._prompts.ids), ppo.prompts_per_step, config.seed)
        which = [index for index in which for _ in range(ppo.answers_per_prompt)]
        ids = [self._prompts.ids[index] for index in which]
        seed = int(np.random.SeedSequence((config.seed, iteration)).generate_state(1)[0])
        # No filter and no temperature: the updates need probabilities of the sampled distribution.
        settings = Settings(
            ppo.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=seed,
            vocab_size=self._tokenizer.vocab_size,
        )  # fmt: skip
        actor = self._models.actor(state.params, self._frozen)
        prepared = engine.prepare(actor, whole=ppo.rollout_gathers_once)
        found, stats = continue_many(
            prepared, ids, settings, rows=ppo.rollout_rows, log_probs=True, prompt_slots=ppo.max_prompt_tokens,
            progress=lambda done: self._start.progress(f"{done} of step {step}"),
        )  # fmt: skip
        del prepared
        texts = [self._tokenizer.decode(c.tokens[:-1] if c.reason == "eos" else c.tokens) for c in found]
        return lay_out([self._prompts.prompts[i] for i in which], ids, found, texts, ppo.row_tokens), stats

    def _score(self, answers: Answers, placed: Batch) -> Scores:
        """Scores whole answers. Raises ArithmeticError for a reward that is not finite in fp32."""
        ppo, parts = self._config.ppo, {}
        if self._held.reward is not None:
            values = self._whole(self._programs.rewards(self._held.reward, placed))
            parts["model"] = ppo.reward_model_weight * values[np.arange(len(values)), answers.last].astype(np.float64)
        questions, records = [p.question for p in answers.prompts], [p.fields for p in answers.prompts]
        for name, function in self._functions.items():
            parts[name] = function(questions, answers.texts, records)
        if ppo.cut_penalty:
            parts["cut"] = np.where(answers.cut, -ppo.cut_penalty, 0.0)
        return add_up(parts)

    def _forward(self, state: TrainState, placed: Batch) -> dict[str, np.ndarray]:
        """fp32 [N, T]: log-probabilities of the actor (as in the updates) and of the reference; values."""
        found = {
            shaping.OLD: self._programs.log_probs(state.params, self._frozen, placed),
            shaping.REFERENCE: self._programs.reference(self._held.reference, placed),
        }
        if self._config.ppo.has_critic:
            found[shaping.VALUE] = self._programs.values(state.params, self._frozen, placed)
        return {name: self._whole(x) for name, x in found.items()}

    def _whole(self, x_CBT: Array) -> np.ndarray:
        return to_host(x_CBT).reshape(-1, x_CBT.shape[-1])

    # ------------------------------------------------------------------------------------------------------ arrays

    def _place_rows(self, rows: Rows) -> Batch:
        """Places rows [N, T] on the mesh as [N / B, B, T]."""
        return {name: self._place(x.reshape(-1, self._config.ppo.micro_rows, x.shape[-1])) for name, x in rows.items()}

    def _lay_out_updates(self, fields: Mapping[str, np.ndarray], iteration: int, coefficient: float) -> Batch:
        """The batch [U * A, B, T]: in each epoch all answers in another order."""
        ppo = self._config.ppo
        orders = [
            np.random.default_rng((self._config.seed, iteration, epoch)).permutation(ppo.answers)
            for epoch in range(ppo.epochs)
        ]
        order = np.concatenate(orders)
        names = (*FIELDS, *shaping.fields_of(ppo))
        batch = self._place_rows({name: fields[name][order] for name in names})
        update = np.repeat(np.arange(ppo.updates, dtype=np.int32), ppo.accumulation_steps)
        batch[shaping.UPDATE] = self._place(update)
        batch[shaping.COEFFICIENT] = self._place(np.full(len(update), coefficient, np.float32))
        return batch

    def _place(self, x: np.ndarray) -> Array:
        """Places an array that every process has on the mesh."""
        axes = (None,) if x.ndim == 1 else (None, "batch", "sequence")
        sharding = NamedSharding(self._start.mesh, spec(*axes))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def _write(self, step: int, answers: Answers, scores: Scores) -> None:
        every = self._config.ppo.keep_rollouts_every
        if not every or (step - 1) % every or jax.process_index() != 0:
            return
        with self._start.expendable.attempt("rollouts"):
            records = []
            for row, (prompt, text) in enumerate(zip(answers.prompts, answers.texts, strict=True)):
                parts = {name: round(float(part[row]), 6) for name, part in scores.parts.items()}
                record = {"messages": prompt.messages, "answer": text, "tokens": int(answers.tokens[row])}
                record |= {"cut": bool(answers.cut[row]), "score": round(float(scores.total[row]), 6), "parts": parts}
                records.append(record)
            write_records(self._start.workdir / FOLDER / f"step_{step}.jsonl", records)


def add_up(parts: Mapping[str, np.ndarray]) -> Scores:
    """Adds up parts [N]. Raises ArithmeticError if a part or a sum is not finite in fp32."""
    total = np.sum([part.astype(np.float64) for part in parts.values()], axis=0)
    for name, part in (*parts.items(), (f"sum ({' + '.join(parts)})", total)):
        wrong = part[~(np.abs(part) <= np.finfo(np.float32).max)]
        if len(wrong):
            raise ArithmeticError(
                f"The reward of an answer has the {name} {wrong[0]:g}: rewards must be finite in fp32; nothing was "
                "learned from this iteration."
            )
    return Scores({name: part.astype(np.float32) for name, part in parts.items()}, total.astype(np.float32))


def short_names(functions: Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    """Reward functions by their short name, with a number added if that is taken."""
    named: dict[str, RewardFunction] = {}
    for number, function in enumerate(functions):
        short = function.name.rpartition(":")[2]
        named[f"{short}_{number}" if short in (*named, "model", "cut", "deviation") else short] = function
    return named


def _rollout_metrics(stats: RefillStats, answers: Answers) -> dict[str, float]:
    return {
        "rollout_efficiency": stats.share_used, "rollout_efficiency_in_batches": stats.share_used_in_batches,
        "rollout_tokens": float(answers.tokens.sum()), "decode_steps": float(stats.decode_steps),
    }  # fmt: skip
