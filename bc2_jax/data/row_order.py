"""What decides which rows each step reads: saved with a checkpoint, compared when a run goes on from it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bc2_jax.config import DataConfig
from bc2_jax.data.corpus import list_parts


def record_row_order(data: DataConfig) -> dict[str, Any]:
    """JSON values by field; the same for the same rows in the same order, wherever their folders are."""
    record: dict[str, Any] = {
        "data.seed": data.seed,
        "data.sequence_length": data.sequence_length,
        "data.stages": [[stage.start_tokens, *stage.weights] for stage in data.stages],
    }
    for index, source in enumerate(data.sources):
        digest = hashlib.sha256()
        for part in list_parts(source.path):
            files = [[info.sha256, info.rows] for info in part.manifest.train.files]
            digest.update(json.dumps([part.bucket, part.mean_weight, files]).encode())
        name = f"data.sources.{index}"
        record |= {f"{name}.rows": digest.hexdigest(), f"{name}.weight": source.weight}
        record[f"{name}.quality_weights"] = list(source.quality_weights)
    return record


def changed_row_order(recorded: dict[str, Any], data: DataConfig, tokens: int) -> list[str]:
    """The fields that `record_row_order` gave other values for when the run had trained on `tokens`.

    Stages that begin later may be added, changed and removed: nothing was read by them.
    """
    now = record_row_order(data)
    before, after = ([s for s in r.get("data.stages", ()) if s[0] < tokens] for r in (recorded, now))
    recorded, now = recorded | {"data.stages": before}, now | {"data.stages": after}
    # Versions before recorded the size of a batch too: the order of rows does not depend on it.
    return sorted(name for name in now if recorded.get(name) != now[name]) + sorted(
        name for name in recorded if name not in now and name != "data.global_batch_size"
    )
