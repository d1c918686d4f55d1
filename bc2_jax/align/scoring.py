"""Scores conversations with a trained reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.align.chat import Message, encode_conversation
from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.convert.reward import load_reward_model
from bc2_jax.data.batch import Batch
from bc2_jax.infer.generate import bucket
from bc2_jax.model.baichuan import Params, place_tokens
from bc2_jax.model.reward import split_reward_model
from bc2_jax.sharding import parts, reshard, spec, use_mesh_of
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

Score = Callable[[Params, Batch], Array]


def make_score(config: ModelConfig, compute: ComputeConfig) -> Score:
    """(parameters of a reward model, batch) -> fp32 [B]: the reward of each row, traceable.

    The batch has input_ids, segment_ids and optionally positions [B, T]: one conversation a row, in one non-zero
    segment; padding on either side, of any ids, is segment 0. A row of padding has reward 0.
    """
    graphdef, _, _ = split_reward_model(config, compute)

    def score(params: Params, batch: Batch) -> Array:
        model, segments_BT = nnx.merge(graphdef, params), batch["segment_ids"]
        ids_BT = jnp.where(segments_BT != 0, batch["input_ids"], config.pad_token_id)  # padding may hold invalid ids
        with use_mesh_of(model.norm.weight[...]):
            values_BT = model.values(ids_BT, batch.get("positions"), segments_BT)
            whole_BT = reshard(segments_BT, "batch", None)
            place_T = jnp.arange(whole_BT.shape[1])
            last_B = jnp.max(jnp.where(whole_BT != 0, place_T, -1), axis=1)
            is_last_BT = reshard(place_T == last_B[:, None], "batch", "sequence")
            return jnp.sum(jnp.where(is_last_BT, values_BT, 0), axis=1)

    return score


class Scorer:
    """A reward model that scores conversations in batches.

    A reward is the fp32 value at the last token, the eos after the answer. Except for rounding it does not depend on
    the other conversations. Lengths are rounded up (`infer.generate.bucket`); each has one compiled program for `rows`
    conversations.
    """

    def __init__(
        self, params: Params, config: ModelConfig, *, compute: ComputeConfig | None = None, rows: int = 8,
        tokenizer: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        """`params` of a `RewardModel` of `config`, NumPy arrays or on any mesh, which is then used. `rows` is rounded
        up to a multiple of the batch shards. `compute` is fp32 by default."""
        require(rows > 0, "rows", rows, "it must be positive")
        self.params, self.config = jax.tree.map(jnp.asarray, params), config
        self.tokenizer = tokenizer
        compute = compute or ComputeConfig(dtype="float32")
        self._weight = self.params["norm"]["weight"]
        with use_mesh_of(self._weight):
            self._rows = -(-rows // parts("batch")) * parts("batch")
            self._columns = parts("sequence")
        score = make_score(config, dataclasses.replace(compute, remat="none"))

        def run(params: Params, ids_BT: Array, segments_BT: Array) -> Array:
            tokens = place_tokens(ids_BT, None, segments_BT)
            batch = {"input_ids": ids_BT, "positions": tokens.positions, "segment_ids": tokens.segments}
            batch = {name: reshard(x, "batch", "sequence") for name, x in batch.items()}
            return reshard(score(params, batch), None)

        self._run = jax.jit(run)

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: DType = "float32", mesh: Mesh | None = None,
        compute: ComputeConfig | None = None, rows: int = 8,
    ) -> Scorer:  # fmt: skip
        """The reward model at `path` (`convert.reward.find_reward_model`), computed in `dtype` and sharded over `mesh`.

        Raises FileNotFoundError or ValueError.
        """
        params, config, found = load_reward_model(path, dtype, mesh)
        compute = dataclasses.replace(compute or ComputeConfig(), dtype=dtype)
        tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer)
        return cls(params, config, compute=compute, rows=rows, tokenizer=tokenizer)

    def score(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        """fp32 [n]: rewards of conversations as token ids, each with its final eos.

        All processes of a mesh call it with the same ids. Raises ValueError for an empty conversation, one longer than
        model_max_length and ids outside the vocabulary.
        """
        ids = [np.asarray(conversation) for conversation in conversations]
        for number, row in enumerate(ids):
            self._check(number, row)
        rewards = np.zeros(len(ids), np.float32)
        # Longest first, so that out-of-memory errors come early.
        for length in sorted({self._length(row) for row in ids}, reverse=True):
            numbers = [number for number, row in enumerate(ids) if self._length(row) == length]
            for first in range(0, len(numbers), self._rows):
                batch = numbers[first : first + self._rows]
                rewards[batch] = self._score_batch([ids[number] for number in batch], length)
        return rewards

    def score_messages(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        """fp32 [n]: rewards of the last messages of conversations.

        Raises ValueError as `encode_conversation` and `score`, or without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("The reward model has no tokenizer beside it: give the Scorer one, or score token ids.")
        return self.score([encode_conversation(self.tokenizer, messages)[0] for messages in conversations])

    def _check(self, number: int, row: np.ndarray) -> None:
        what, limit = f"conversations[{number}]", self.config.model_max_length
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise ValueError(f"{what} is not valid: it must be a list of token ids, at least one.")
        if len(row) > limit:
            raise ValueError(f"{what} has {len(row)} tokens; model_max_length = {limit} is the most.")
        if row.min() < 0 or row.max() >= self.config.vocab_size:
            raise ValueError(f"{what} has an id that is not in 0..{self.config.vocab_size - 1}.")

    def _length(self, row: np.ndarray) -> int:
        length = bucket(len(row))
        return -(-length // self._columns) * self._columns

    def _score_batch(self, ids: list[np.ndarray], length: int) -> np.ndarray:
        tokens = np.full((self._rows, length), self.config.pad_token_id, np.int32)
        segments = np.zeros_like(tokens)
        for row, conversation in enumerate(ids):
            tokens[row, : len(conversation)], segments[row, : len(conversation)] = conversation, 1
        with use_mesh_of(self._weight):
            rewards = self._run(self.params, self._place(tokens), self._place(segments))
        return np.asarray(rewards)[: len(ids)]

    def _place(self, x: np.ndarray) -> Array | np.ndarray:
        sharding = self._weight.sharding
        if not isinstance(sharding, NamedSharding):
            return x
        return jax.make_array_from_callback(x.shape, NamedSharding(sharding.mesh, spec()), lambda index: x[index])
