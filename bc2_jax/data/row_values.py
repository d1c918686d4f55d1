"""Values stored beside packed rows, such as a reference's log-probabilities or the margins of pairs.

They are found by a digest of a row's content, whatever its order, batch or file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.data.batch import Rows
from bc2_jax.files import replaced

DIGESTED = ("input_ids", "labels", "segment_ids")
"""Fields that determine the content of a row."""


def digest_rows(rows: Rows) -> np.ndarray:
    """uint64 [b]: a hash of DIGESTED of each row, equal on every machine."""
    together = np.concatenate([np.asarray(rows[name], "<i4") for name in DIGESTED], axis=-1)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in together)
    return np.frombuffer(digests, "<u8")


class RowValues:
    """A table of fp32 [W] by row."""

    def __init__(self, digests: np.ndarray, values: np.ndarray, about: dict[str, Any] | None = None):
        """`values` [n, W] of rows with `digests` [n], of which the first of equal ones counts; `about` is saved with
        them, as JSON. Raises ValueError for shapes that do not agree."""
        if values.ndim != 2 or digests.shape != values.shape[:1]:
            raise ValueError(f"values have shape {values.shape}; for digests {digests.shape} it must be [n, W].")
        self._digests, first = np.unique(digests.astype(np.uint64), return_index=True)
        self._values = np.ascontiguousarray(values[first], np.float32)
        self.about = about or {}

    def __len__(self) -> int:
        return len(self._digests)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(digests, uint64 [n] in order; values, fp32 [n, W])."""
        return self._digests, self._values

    @property
    def width(self) -> int:
        """W."""
        return self._values.shape[1]

    def find(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(values fp32 [b, W], missing bool [b]) of rows; the values of missing and padding rows are 0."""
        digests = digest_rows(rows)
        empty = np.all(rows["segment_ids"] == 0, axis=-1, keepdims=True)[:, 0]
        if not len(self):
            return np.zeros((len(digests), self.width), np.float32), ~empty
        places = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        missing = (self._digests[places] != digests) & ~empty
        return np.where((empty | missing)[:, None], np.float32(0), self._values[places]), missing

    def lookup(self, rows: Rows) -> np.ndarray:
        """fp32 [b, W] of each row; 0 for rows of padding. Raises ValueError for a missing row."""
        found, missing = self.find(rows)
        if missing.any():
            raise ValueError(
                f"{missing.sum()} of {len(missing)} rows are not among the {len(self)} with stored values: the rows "
                "were made again, or some were unreadable when the values were computed."
            )
        return found

    def save(self, path: Path) -> None:
        """Writes a .npz, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = np.frombuffer(json.dumps(self.about).encode(), np.uint8)
        with replaced(path) as partial, partial.open("wb") as file:
            np.savez(file, digests=self._digests, values=self._values, about=about)

    @classmethod
    def load(cls, path: Path) -> RowValues:
        """Reads what `save` wrote. Raises FileNotFoundError without a file, ValueError for a damaged or foreign one."""
        try:
            with np.load(path, allow_pickle=False) as file:  # data: nothing in it is executed
                return cls(file["digests"], file["values"], json.loads(file["about"].tobytes()))
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no values of rows, or is damaged: {str(error).rstrip('.')}.") from error
