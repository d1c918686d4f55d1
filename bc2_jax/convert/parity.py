"""Compares a model's outputs with a reference's: logits, hidden states, and the first layer that differs.

Works on numpy arrays, whoever computed them.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.validation import require

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Tolerance relative to the largest value, by compute dtype."""

_BLOCK_VALUES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A model's outputs for token ids."""

    logits: np.ndarray  # [B, T, V]
    hidden_states: np.ndarray
    """[L + 1, B, T, D]: after the embedding, after each layer but the last, after the final norm."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """Differences between a model's outputs and a reference's; values that are not finite make them NaN or inf."""

    tolerance: float  # largest legal difference, relative to the largest value
    largest_logit: float
    largest_logit_difference: float
    mean_logit_difference: float
    top1_agreement: float  # share of positions, 0 to 1, with the same most likely token
    kl: float  # KL(reference || ours) of next-token distributions in nats, mean over positions
    largest_hidden: tuple[float, ...]  # largest absolute value of each of the reference's hidden states, [L + 1]
    hidden_difference: tuple[float, ...]  # largest absolute difference of each hidden state, [L + 1]

    @property
    def first_divergent(self) -> int | None:
        """Index of the first hidden state that differs by more than `tolerance` times its largest value."""
        pairs = zip(self.hidden_difference, self.largest_hidden, strict=True)
        return next((i for i, pair in enumerate(pairs) if not self._agree(*pair)), None)

    @property
    def logits_agree(self) -> bool:
        return self._agree(self.largest_logit_difference, self.largest_logit)

    @property
    def holds(self) -> bool:
        return self.logits_agree and self.first_divergent is None

    def _agree(self, difference: float, largest: float) -> bool:
        return math.isfinite(difference) and difference <= self.tolerance * largest


def compare(reference: Outputs, ours: Outputs, tolerance: float) -> Parity:
    """Compares outputs of any float dtype in fp64, one block of positions at a time.

    Raises ValueError if shapes differ, there are no positions, or `tolerance` is not positive.
    """
    require(0 < tolerance < math.inf, "tolerance", tolerance, "it must be positive and finite")
    for name in ("logits", "hidden_states"):
        shape, expected = getattr(ours, name).shape, getattr(reference, name).shape
        require(shape == expected, f"shape of {name}", shape, f"the reference's is {expected}")
        require(math.prod(shape) > 0, f"shape of {name}", shape, "there is nothing to compare")
    vocab_size = reference.logits.shape[-1]
    largest = difference = 0.0
    total = kl = 0.0
    agreeing = positions = 0
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite show in the result
        for a, b in _blocks(reference.logits, ours.logits):
            gap = np.abs(a - b)
            largest, difference = _maximum(largest, np.abs(a)), _maximum(difference, gap)
            total += float(gap.sum())
            agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
            log_p, log_q = _log_softmax(a), _log_softmax(b)
            kl += float((np.exp(log_p) * (log_p - log_q)).sum())
            positions += len(a)
        largest_hidden, hidden_difference = [], []
        for mine, other in zip(reference.hidden_states, ours.hidden_states, strict=True):
            layer_largest = layer_difference = 0.0
            for a, b in _blocks(mine, other):
                layer_largest = _maximum(layer_largest, np.abs(a))
                layer_difference = _maximum(layer_difference, np.abs(a - b))
            largest_hidden.append(layer_largest)
            hidden_difference.append(layer_difference)
    return Parity(
        tolerance=tolerance,
        largest_logit=largest,
        largest_logit_difference=difference,
        mean_logit_difference=total / (positions * vocab_size),
        top1_agreement=agreeing / positions,
        kl=kl / positions,
        largest_hidden=tuple(largest_hidden),
        hidden_difference=tuple(hidden_difference),
    )


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two arrays [..., C] as blocks of fp64 [positions, C], because all logits in fp64 would take too much memory."""
    channels = a.shape[-1]
    a, b = a.reshape(-1, channels), b.reshape(-1, channels)
    step = max(1, _BLOCK_VALUES // channels)
    for i in range(0, len(a), step):
        yield a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64)


def _maximum(so_far: float, values: np.ndarray) -> float:
    """Unlike max(), keeps NaN."""
    return float(np.maximum(so_far, values.max()))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def hidden_state_name(index: int, num_layers: int) -> str:
    """Where the hidden state comes from; the last layer's is visible only after the final norm."""
    if index == 0:
        return "embedding"
    return f"layer {index - 1}" + (" and final norm" if index == num_layers else "")


def read_reference(path: str | Path, config: ModelConfig) -> tuple[np.ndarray, Outputs]:
    """Reads recorded outputs: (token ids [B, T], a model's outputs for them).

    The .npz has `input_ids`, `hidden_states` and `eval_logits`, or `train_logits` if that is missing. Raises
    FileNotFoundError, or ValueError if an array is missing or does not fit `config`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference = {str(path)!r} is not a file: an .npz with recorded outputs is needed.")
    try:
        with np.load(path) as archive:
            logits_key = "eval_logits" if "eval_logits" in archive else "train_logits"
            keys = ("input_ids", logits_key, "hidden_states")
            arrays = {key: archive[key] for key in keys if key in archive}
    # Exceptions of zipfile and zlib for damaged files; RuntimeError for newer zip versions and encryption.
    except (ValueError, TypeError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"reference = {str(path)!r} is not an .npz file of plain arrays.") from error
    if missing := [key for key in keys if key not in arrays]:
        named = ", ".join("eval_logits or train_logits" if key == logits_key else key for key in missing)
        raise ValueError(f"reference = {str(path)!r} has no {named}: expected input_ids, logits and hidden_states.")
    input_ids, logits, hidden_states = arrays.values()
    check_ids(input_ids, config)
    for key, expected in {
        logits_key: (*input_ids.shape, config.vocab_size),
        "hidden_states": (config.num_hidden_layers + 1, *input_ids.shape, config.hidden_size),
    }.items():
        shape = arrays[key].shape
        require(
            shape == expected, f"shape of {key}", shape, f"for this model and these input_ids it must be {expected}"
        )
        require(arrays[key].dtype.kind == "f", f"dtype of {key}", arrays[key].dtype.name, "it must be a float")
    return input_ids, Outputs(logits, hidden_states)


def check_ids(input_ids: np.ndarray, config: ModelConfig) -> None:
    """Raises ValueError unless `input_ids` is a non-empty integer array [B, T] of ids in the vocabulary."""
    require(input_ids.dtype.kind in "iu", "dtype of input_ids", input_ids.dtype.name, "it must be an integer type")
    shape = input_ids.shape
    require(
        len(shape) == 2 and input_ids.size > 0, "shape of input_ids", shape, "it must be [batch, length], both positive"
    )
    outside = (input_ids < 0) | (input_ids >= config.vocab_size)
    if outside.any():
        require(False, "token id", int(input_ids[outside][0]), f"it must be in 0..{config.vocab_size - 1}")
