"""Checks a model's vocabulary against its tokenizer, and grows it."""

from __future__ import annotations

import dataclasses

import numpy as np

from bc2_jax.convert.source import Source
from bc2_jax.convert.stream import HEAD, row_blocks
from bc2_jax.tokenizer import Tokenizer

EMBEDDING = "embed_tokens.weight"


def check_vocabulary(source: Source, allow_unused_rows: bool = False) -> None:
    """Raises ValueError if the vocabulary does not match the tokenizer beside the model.

    A larger vocabulary (padded, or grown for future pieces) is legal with `allow_unused_rows`. A smaller one never is:
    the tokenizer would give ids without a row.
    """
    if source.tokenizer is None:
        return
    pieces, rows = Tokenizer(str(source.tokenizer)).vocab_size, source.config.vocab_size
    if pieces > rows:
        raise ValueError(
            f"vocab_size = {rows} is not valid: {source.tokenizer} has {pieces} pieces; "
            f"--resize-vocab {pieces} grows it."
        )
    if pieces < rows and not allow_unused_rows:
        raise ValueError(
            f"vocab_size = {rows} is not that of {source.tokenizer}, which has {pieces} pieces; pass "
            "--allow-unused-rows if the vocabulary was padded or grown on purpose."
        )


def resize_vocab(source: Source, size: int, seed: int = 0) -> Source:
    """The same model with `size` token ids; old rows keep their bits, new ones come from `new_rows`.

    Raises ValueError for fewer rows, which would lose tokens.
    """
    old = source.config.vocab_size
    if size < old:
        raise ValueError(f"--resize-vocab {size} is not valid: the model has {old} token ids, and none may be lost.")

    def read(path: str, layer: int | None) -> np.ndarray:
        array = source.read(path, layer)
        if path not in (EMBEDDING, HEAD):
            return array
        # Each table has its own generator, so the order of reading does not matter.
        generator = np.random.default_rng([seed, int(path == HEAD)])
        unit = path == HEAD and source.config.normalize_head
        return np.concatenate([array, new_rows(array, size - old, unit, generator)])

    return dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=size), read=read)


def new_rows(rows: np.ndarray, count: int, unit: bool, generator: np.random.Generator) -> np.ndarray:
    """[count, D] rows for new tokens: the mean of the old rows plus Gaussian noise up to their usual length.

    Their inner product with a hidden state is about the mean one, and no two are equal. With `unit` (NormHead) the
    directions of old rows are averaged, because their lengths have no effect; a row of zeros, which would give 0 / 0
    there, cannot occur.
    """
    total, squares, lengths = np.zeros(rows.shape[1]), 0.0, 0.0
    for block in row_blocks(rows):
        block = block.astype(np.float32)
        norms = np.sqrt(np.sum(block * block, axis=1, keepdims=True))
        lengths += float(norms.sum())
        if unit:
            block = block / np.maximum(norms, 1e-12)
        total += block.sum(axis=0, dtype=np.float64)
        squares += float(np.sum(block * block, dtype=np.float64))
    mean = total / len(rows)
    missing = max(squares / len(rows) - float(mean @ mean), 0.0)
    noise = generator.standard_normal((count, rows.shape[1]), dtype=np.float32) * np.sqrt(missing / rows.shape[1])
    scale = lengths / len(rows) if unit else 1.0
    return ((mean + noise) * scale).astype(rows.dtype)
