"""`Scorer`: log-likelihoods of continuations and of whole texts, and generation, for many requests at once.

Common prefixes of requests are found by token ids and computed once (`sharing`); rows of many requests run in few
shapes (`infer.score`). Scores are from the model's raw logits in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bc2_jax.evaluate.batching import Batch, Item, Shapes, make_batches
from bc2_jax.evaluate.encoding import Encoded, Request, cut_windows, encode_pairs
from bc2_jax.evaluate.generation import Generated, Prompt, generate_texts
from bc2_jax.infer.prepared import Prepared, prepare
from bc2_jax.infer.score import score_rows
from bc2_jax.infer.settings import is_whole
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import parts, to_host, use_mesh_of
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

Progress = Callable[[int, int], object]  # called with (requests done, all requests)

NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.05}
"""Logits closer than this may swap if sums are ordered differently."""


class Score(NamedTuple):
    """The result of one request."""

    log_prob: float  # nats of the whole continuation
    is_greedy: bool  # whether each of its tokens has the largest logit
    log_probs: np.ndarray  # fp32, per token
    near_tie: bool  # whether is_greedy may depend on rounding
    cut: int  # context tokens dropped at its beginning to fit max_length


class Rolled(NamedTuple):
    """The score of a whole text."""

    log_prob: float  # nats
    tokens: int
    bytes: int  # UTF-8


@dataclasses.dataclass
class ScorerStats:
    """Counts of a `Scorer` since its creation."""

    requests: int = 0  # including windows of texts
    fallbacks: int = 0  # pairs with a token across their border (`Encoded.fallback`)
    truncated: int = 0  # requests with a cut context
    near_ties: int = 0
    tokens_unshared: int = 0  # tokens if each request were fed alone
    tokens_fed: int = 0  # tokens fed, without padding
    slots: int = 0  # tokens fed, with padding
    batches: int = 0
    seconds: float = 0.0  # scoring time with compilation

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens_fed / max(self.slots, 1)


class Scorer:
    """A model and its tokenizer, ready to score batches of texts; the one way to run a model over many texts.

    Results are independent of the order of requests, of what is scored with them and of the mesh, up to fp32 rounding
    (1e-5). Pass requests with common prefixes in one call, so that these are computed once. All processes make the same
    calls and get all results.
    """

    def __init__(
        self, model: Baichuan2, tokenizer: Tokenizer, *, max_length: int | None = None, rows: int | None = None,
        row_length: int | None = None, prefix_id: int | None = None,
    ) -> None:  # fmt: skip
        """`max_length`: tokens fed per request, by default model_max_length. `rows` of `row_length` tokens make a
        batch; by default both are chosen. `prefix_id`: the token before texts without context, by default bos."""
        config = model.config
        for name, value in (("max_length", max_length), ("rows", rows), ("row_length", row_length)):
            require(value is None or (is_whole(value) and value > 0), name, value, "it must be a positive whole number")
        legal = f"it must be a token id in 0..{config.vocab_size - 1}"
        known = prefix_id is None or (is_whole(prefix_id) and 0 <= prefix_id < config.vocab_size)
        require(known, "prefix_id", prefix_id, legal)
        self.model, self.tokenizer, self.stats = model, tokenizer, ScorerStats()
        self.max_length = config.model_max_length if max_length is None else max_length
        self.prefix_id = config.bos_token_id if prefix_id is None else prefix_id
        with use_mesh_of(model.norm.weight[...]):
            self._shapes = Shapes(config, rows, row_length, parts("batch"), parts("sequence"))

    def encode_pair(self, context: str, continuation: str) -> Encoded:
        """`encoding.encode_pairs` of one pair."""
        return encode_pairs(self.tokenizer, [(context, continuation)], self.prefix_id)[0]

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether it is greedy) of each pair.

        Raises ValueError as `encode_pairs` and `score`.
        """
        encoded = encode_pairs(self.tokenizer, pairs, self.prefix_id)
        self.stats.fallbacks += sum(pair.fallback for pair in encoded)
        found = self.score([Request(pair.context, pair.continuation) for pair in encoded], progress)
        return [(score.log_prob, score.is_greedy) for score in found]

    def rolling(self, texts: Sequence[str], stride: int | None = None, progress: Progress | None = None) -> list[float]:
        """log p of each whole text in nats; see `roll`."""
        return [rolled.log_prob for rolled in self.roll(texts, stride, progress)]

    def roll(self, texts: Sequence[str], stride: int | None = None, progress: Progress | None = None) -> list[Rolled]:
        """log p, tokens and bytes of each whole text.

        Texts are scored in windows of max_length tokens that advance by `stride` tokens, by default max_length; a
        smaller stride gives more context and takes longer (`encoding.cut_windows`). Raises ValueError for a stride out
        of range, and for one text instead of a list.
        """
        stride = self.max_length if stride is None else stride
        legal = f"it must be a whole number in 1..{self.max_length}, the longest window"
        require(is_whole(stride) and 1 <= stride <= self.max_length, "stride", stride, legal)
        ids = self.tokenizer.encode_batch(texts)
        windows = [list(cut_windows(of_text, self.prefix_id, self.max_length, stride)) for of_text in ids]
        scores = iter(self.score([window for of_text in windows for window in of_text], progress))
        return [
            Rolled(sum(next(scores).log_prob for _ in windows_of), len(ids_of), len(text.encode()))
            for windows_of, ids_of, text in zip(windows, ids, texts, strict=True)
        ]

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Scores of token ids, in the order of `requests`.

        A request longer than max_length + 1 (its last token is not fed) loses the beginning of its context. `progress`
        is called after each batch. Raises ValueError for a request without context or continuation, with an unknown id
        or with a continuation longer than max_length.
        """
        start = time.perf_counter()
        items = [self._item(number, request) for number, request in enumerate(requests)]
        found: dict[int, Score] = {}
        if items:
            plan = self._shapes.plan(items)
            self.stats.tokens_fed += plan.tokens
            for batch in make_batches(plan, items, self._shapes):
                found |= self._run(batch, items)
                if progress is not None:
                    progress(len(found), len(items))
        self.stats.requests += len(items)
        self.stats.truncated += sum(item.cut > 0 for item in items)
        self.stats.near_ties += sum(score.near_tie for score in found.values())
        self.stats.tokens_unshared += sum(len(item.fed) for item in items)
        self.stats.seconds += time.perf_counter() - start
        return [found[number] for number in range(len(items))]

    def generate(self, prompts: Sequence[tuple[str | Sequence[int], Sequence[str], int]]) -> list[str]:
        """Greedy continuations of each (prompt, stop texts, max_new_tokens); see `generate_texts`."""
        return [generated.text for generated in self.generate_texts(prompts)]

    def generate_texts(
        self,
        prompts: Sequence[tuple[str | Sequence[int], Sequence[str], int]],
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Generated]:
        """`generation.generate_texts` of (prompt, stop texts, max_new_tokens)."""
        if not prompts:
            return []
        for number, prompt in enumerate(prompts):
            legal = "it must be a prompt, its stop texts and max_new_tokens"
            require(_has(prompt, len(Prompt._fields)), f"prompts[{number}]", prompt, legal)
        asked = [Prompt(*prompt) for prompt in prompts]
        return generate_texts(
            self._prepared, self.tokenizer, asked, max_length=self.generation_length, progress=progress, **settings
        )

    @property
    def generation_length(self) -> int:
        """Tokens of prompt and answer: max_length, at most the model's."""
        return min(self.max_length, self.model.config.model_max_length)

    @functools.cached_property
    def _prepared(self) -> Prepared:
        return prepare(self.model)

    def _item(self, number: int, request: Request) -> Item:
        legal = "it must be two lists of token ids, context and continuation"
        require(_has(request, len(Request._fields)), f"requests[{number}]", request, legal)
        context, continuation = (np.asarray(ids) for ids in request)
        for name, ids in zip(Request._fields, (context, continuation), strict=True):
            right = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
            require(right, f"requests[{number}].{name}", ids.tolist(), "it must be a list of at least one token id")
            if ids.min() < 0 or ids.max() >= self.model.config.vocab_size:
                most = self.model.config.vocab_size - 1
                raise ValueError(f"requests[{number}] has a token id in its {name} that is not in 0..{most}.")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"requests[{number}] has a continuation of {len(continuation)} tokens; max_length = {self.max_length} "
                "is the most."
            )
        cut = max(len(context) + len(continuation) - self.max_length - 1, 0)
        fed = np.concatenate([context[cut:], continuation[:-1]]).astype(np.int32)
        return Item(fed, continuation.astype(np.int32), cut)

    def _run(self, batch: Batch, items: Sequence[Item]) -> dict[int, Score]:
        log_prob, is_argmax, margin = map(to_host, score_rows(self.model, batch.rows))
        self.stats.batches += 1
        self.stats.slots += batch.rows.ids_BT.size
        near = NEAR_TIE.get(self.model.compute.dtype, NEAR_TIE["float32"])
        found = {}
        for number, row, first in batch.slots:
            here = row, slice(first, first + len(items[number].labels))
            # The token with the smallest margin decides.
            near_tie = bool(abs(margin[here].min()) < near)
            total = float(log_prob[here].sum(dtype=np.float64))
            found[number] = Score(
                total, bool(is_argmax[here].all()), log_prob[here].copy(), near_tie, items[number].cut
            )
        return found


def _has(fields: object, count: int) -> bool:
    """Whether it is a tuple or list of `count` fields."""
    return isinstance(fields, Sequence) and not isinstance(fields, str) and len(fields) == count
