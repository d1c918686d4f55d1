"""Log-probabilities of the reference model of preference tuning, computed once and cached.

They are computed before the first step by the forward pass of training, and stored in the workdir, so that the run
resumes bit for bit, and in a cache, for other runs from the same model on the same pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bc2_jax.agreement import first_decides
from bc2_jax.align.pairs import branch_sums
from bc2_jax.align.tuning import label_log_probs
from bc2_jax.config import DPOConfig
from bc2_jax.data.batch import Batch, Rows, batch_part, make_put
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.loader import make_batches_of
from bc2_jax.data.row_file import BadRows
from bc2_jax.data.row_values import RowValues, digest_rows
from bc2_jax.files import fingerprint
from bc2_jax.model.baichuan import Baichuan2, Params, split_model
from bc2_jax.sharding import reshard
from bc2_jax.train.distributed import EXIT_PREEMPTED, Preempted
from bc2_jax.train.evaluation import read_together
from bc2_jax.train.loop import Start

REFERENCE = "reference"
"""Field of a batch, fp32 [A, B / A, 2 P]: the reference's log-probabilities of the answers of each pair, chosen and
rejected in turn."""
NAME = "reference.npz"
"""The run's own copy, in the workdir."""
SAVE_SECONDS = 300
"""How often unfinished results are saved."""
_DIGEST = "digest"
_log = logging.getLogger(__name__)


def answer_log_probs(model: Baichuan2, batch: Batch, most_pairs: int, chunk: int) -> Array:
    """fp32 [B, P, 2]: the sum of the log-probabilities of the tokens of each answer, eos included, nats."""
    return branch_sums(label_log_probs(model, batch, chunk), batch, most_pairs)


def describe(config: DPOConfig, checksum: str, most_pairs: int) -> dict[str, Any]:
    """The cache key, JSON values: parameters (by `checksum`), model, numerics and rows.

    Mesh, batch size and blocks are left out: they only change the order of sums.
    """
    model = dataclasses.asdict(config.model)
    for name in ("z_loss_weight", "initializer_range", "model_max_length"):  # without effect
        del model[name]
    manifests = [
        json.dumps(dataclasses.asdict(part.manifest), sort_keys=True)
        for source in config.data.sources
        for part in list_parts(source.path)
    ]
    rows = hashlib.sha256("\n".join(sorted(manifests)).encode()).hexdigest()
    about = {
        "parameters": checksum, "model": model, "dtype": config.compute.dtype, "attention": config.compute.attention,
        "rows": rows, "most_pairs": most_pairs,
    }  # fmt: skip
    return json.loads(json.dumps(about))


def find_or_compute(
    config: DPOConfig, start: Start, most_pairs: int, checksum: str, load: Callable[[], Params]
) -> RowValues:  # fmt: skip
    """fp32 [2 P] of every training and held-out row, under the parameters with this `checksum`, which `load` returns.

    They are read from the workdir or the cache, or computed. All processes call it and get what the first one found.
    Raises Preempted if the run is stopped meanwhile; finished batches are saved.
    """
    about = describe(config, checksum, most_pairs)
    name = fingerprint(about)[:32]
    cache = Path(config.dpo.reference_cache).expanduser() / f"{name}.npz"
    found, where = _share(lambda: _find([start.workdir / NAME, cache], about))
    if found is None or "next_batch" in found.about:
        found = compute(config, start, most_pairs, load(), about, cache, found)
    else:
        start.say(f"Reference: log-probabilities of {len(found):,} rows found in {where}.")
    return found


def _find(paths: list[Path], about: dict[str, Any]) -> tuple[RowValues | None, str]:
    """The first file whose key is `about`, and its path."""
    for path in paths:
        try:
            found = RowValues.load(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            _log.warning("%s It is ignored.", error)
            continue
        if found.about.get("of") == about:
            return found, str(path)
        if path.name != NAME:  # a run may be resumed with other pairs
            _log.warning("%s belongs to another model or to other pairs than its name says. It is ignored.", path)
    return None, ""


def _share(find: Callable[[], tuple[RowValues | None, str]]) -> tuple[RowValues | None, str]:
    """The result of `find` on process 0, on every process."""
    if jax.process_count() == 1:
        return find()
    found, where = find() if jax.process_index() == 0 else (None, "")
    facts = first_decides(lambda: None if found is None else [len(found), found.width, found.about, where])
    if facts is None:
        return None, ""
    count, width, about, where = facts
    empty = np.zeros(count, np.uint64), np.zeros((count, width), np.float32)
    digests, values = empty if found is None else found.arrays()
    # JAX has no 64-bit numbers by default.
    words, values = multihost_utils.broadcast_one_to_all((digests.view(np.uint32), values))
    return RowValues(np.ascontiguousarray(words).view(np.uint64), np.asarray(values), about), where


def compute(
    config: DPOConfig, start: Start, most_pairs: int, params: Params, about: dict[str, Any], cache: Path,
    begun: RowValues | None,
) -> RowValues:  # fmt: skip
    """Computes the values of all rows, those of the first batches taken from `begun`, and saves them in `cache`."""
    data, mesh = config.data, start.mesh
    part, bad_rows = batch_part(mesh, jax.process_index()), BadRows(data.max_bad_rows)
    batches = make_batches_of(
        ("train", "validation"), data, data.global_batch_size, bad_rows=bad_rows,
        process_index=part.process_index, process_count=part.process_count,
    )  # fmt: skip
    step, put, began = jax.jit(make_reference_step(config, mesh, most_pairs)), make_put(data, mesh), time.monotonic()
    digests: list[np.ndarray] = []
    values: list[np.ndarray] = []
    first = 0
    if begun is not None and begun.about["batch_size"] == data.global_batch_size:
        first = begun.about["next_batch"]
        digests, values = [begun.arrays()[0]], [begun.arrays()[1]]

    def read(index: int) -> Batch:
        rows: Rows = batches[index]
        there = (rows["segment_ids"] > 0).any(-1)  # not the padding rows of the last batch
        return put(rows | {_DIGEST: (digest_rows(rows) * there).view(np.uint32).reshape(-1, 2)})

    def gather(result: tuple[Array, Array]) -> None:
        digest = np.ascontiguousarray(np.asarray(result[1])).view(np.uint64)[:, 0]
        digests.append(digest[digest != 0])
        values.append(np.asarray(result[0])[digest != 0])
        if not np.isfinite(values[-1]).all():
            raise ValueError(
                f"init_from = {config.init_from!r} is not valid: it gives log-probabilities that are not finite."
            )

    def keep(done: int) -> RowValues:
        whole = done == len(batches)
        unfinished = {} if whole else {"next_batch": done, "batch_size": data.global_batch_size}
        found = RowValues(np.concatenate(digests), np.concatenate(values), {"of": about} | unfinished)
        # Not with unreadable rows: other runs may be able to read them.
        if jax.process_index() == 0 and not bad_rows.metrics():
            with start.expendable.attempt("reference log-probabilities"):
                found.save(cache)
        return found

    start.say(f"Reference: computing log-probabilities of {len(batches) - first:,} batches.")
    pending, saved = None, began
    for index in range(first, len(batches)):
        result = step(params, read_together(read, index))
        if pending is not None:  # the batch before: the devices compute the newest meanwhile
            gather(pending)
        pending = result
        if not start.progress(f"reference of batch {index + 1} of {len(batches)}"):
            gather(pending)
            keep(index + 1)
            raise Preempted(
                f"Stopped by SIGTERM: the reference of {index + 1} of {len(batches)} batches is computed; resume with "
                "--resume auto.", EXIT_PREEMPTED,
            )  # fmt: skip
        if index > first and time.monotonic() - saved > SAVE_SECONDS:
            keep(index)
            saved = time.monotonic()
    if pending is not None:
        gather(pending)
    found = keep(len(batches))
    seconds = time.monotonic() - began
    start.say(f"Reference: log-probabilities of {len(found):,} rows computed in {seconds:.1f} s, saved in {cache}.")
    return found


def make_reference_step(
    config: DPOConfig, mesh: Mesh, most_pairs: int
) -> Callable[[Params, Batch], tuple[Array, Array]]:  # fmt: skip
    """(parameters of the whole model, batch [A, B / A, ...]) -> (values, fp32 [B, 2 P]; digests), replicated."""
    graphdef, _, _ = split_model(config.model, config.compute)

    def reference_step(params: Params, batch: Batch) -> tuple[Array, Array]:
        def run(_: None, micro: Batch) -> tuple[None, Array]:
            model = nnx.merge(graphdef, params)
            return None, answer_log_probs(model, micro, most_pairs, config.compute.loss_chunk)

        digests = batch[_DIGEST]
        _, sums = jax.lax.scan(run, None, {name: x for name, x in batch.items() if name != _DIGEST})
        sums, digests = (reshard(x, *[None] * x.ndim) for x in (sums, digests))
        return sums.reshape(-1, 2 * most_pairs), digests.reshape(-1, 2)

    return reference_step
