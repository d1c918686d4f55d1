"""Rewards of conversations by a trained reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from bc2_jax.model.reward import RewardModel, split_reward_model
from bc2_jax.sharding import parts, reshard, spec, use_mesh_of
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

Score = Callable[[Params, Batch], Array]


def make_score(config: ModelConfig, compute: ComputeConfig) -> Score:
    """(parameters of a reward model, batch) -> fp32 [B]: the reward of each row, to be traced into a larger program.

    The batch has input_ids and segment_ids [B, T], and positions if it likes: one conversation a row, its tokens in
    one segment and padding, of any ids, in segment 0 on either side. A row of padding alone has the reward 0.
    """
    graphdef, _, _ = split_reward_model(config, compute)

    def score(params: Params, batch: Batch) -> Array:
        return last_values(nnx.merge(graphdef, params), batch)

    return score


def last_values(model: RewardModel, batch: Mapping[str, Array]) -> Array:
    """fp32 [B]: the value at the last token of each row that is not padding; `make_score` says of what."""
    segments_BT = batch["segment_ids"]
    ids_BT = jnp.where(segments_BT != 0, batch["input_ids"], model.config.pad_token_id)  # rubbish may be no id at all
    with use_mesh_of(model.norm.weight[...]):
        values_BT = model.values(ids_BT, batch.get("positions"), segments_BT)
        whole_BT = reshard(segments_BT, "batch", None)
        place_T = jnp.arange(whole_BT.shape[1])
        last_B = jnp.max(jnp.where(whole_BT != 0, place_T, -1), axis=1)
        is_last_BT = reshard(place_T == last_B[:, None], "batch", "sequence")
        return jnp.sum(jnp.where(is_last_BT, values_BT, 0), axis=1)


class Scorer:
    """A reward model, ready to score conversations in batches of few shapes.

    A reward is the value at the last token, which in training was the eos behind the answer, in fp32. It does not
    depend on what else is scored, on the order, or on how many are scored together, but for rounding: the lengths
    are rounded up (`infer.generate.bucket`), so that each length has one compiled program for `rows` conversations.
    """

    def __init__(
        self, params: Params, config: ModelConfig, *, compute: ComputeConfig | None = None, rows: int = 8,
        tokenizer: Tokenizer | None = None, statistics: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`params` of a `RewardModel` of `config`, on any mesh, which is used; arrays of numpy are taken too. `rows` is
        rounded up to what the mesh cuts evenly. `compute`: by default in fp32. `statistics` as those of
        `FoundRewardModel`."""
        require(rows > 0, "rows", rows, "it must be positive")
        self.params, self.config = jax.tree.map(jnp.asarray, params), config
        self.tokenizer, self.statistics = tokenizer, statistics
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
        """The reward model that `path` means to `convert.reward.find_reward_model`, computed in `dtype`.

        With a mesh its parameters are cut over it. Raises FileNotFoundError or ValueError in one sentence.
        """
        params, config, found = load_reward_model(path, dtype, mesh)
        compute = dataclasses.replace(compute or ComputeConfig(), dtype=dtype)
        tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer)
        return cls(params, config, compute=compute, rows=rows, tokenizer=tokenizer, statistics=found.statistics)

    def score(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        """fp32 [n]: the rewards of token ids of whole conversations, each with the eos at its end.

        All processes of a mesh call it with the same ones. Raises ValueError for a conversation without a token, longer
        than model_max_length or with an id that the model does not have.
        """
        ids = [np.asarray(conversation) for conversation in conversations]
        for number, row in enumerate(ids):
            self._check(number, row)
        rewards = np.zeros(len(ids), np.float32)
        # Longest first: what does not fit the memory fails at once.
        for length in sorted({self._length(row) for row in ids}, reverse=True):
            numbers = [number for number, row in enumerate(ids) if self._length(row) == length]
            for first in range(0, len(numbers), self._rows):
                batch = numbers[first : first + self._rows]
                rewards[batch] = self._score_batch([ids[number] for number in batch], length)
        return rewards

    def score_messages(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        """fp32 [n]: the rewards of conversations whose last message is the answer to be judged.

        Raises ValueError as `encode_conversation` and `score`, or if there is no tokenizer.
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
