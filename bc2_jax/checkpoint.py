"""Checkpoints with Orbax: asynchronous, atomic, verified by hash, restorable on any mesh.

A training checkpoint is a folder with the items `params` (fp32, named as in the model) and `opt_state`, and metadata
with the config and the position in the data: everything for a bit-exact resume. A params-only checkpoint has `params`
and the model config.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from bc2_jax import manifest
from bc2_jax.agreement import any_text, first_decides
from bc2_jax.config import CheckpointConfig
from bc2_jax.files import sync
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.metadata import Metadata, is_complete, read_training_metadata
from bc2_jax.model.baichuan import Params

TOKENIZER_NAME = "tokenizer.model"

# Small enough that a device of a pod reads little more than its shard, large enough for disks and object stores.
CHUNK_BYTES = 64 << 20

_log = logging.getLogger(__name__)

# The operating system's reason within TensorStore's error messages.
_REASONS = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Read-only file system|Permission denied|"
    "Input/output error|Not a directory|No such file or directory|Stale file handle"
)


class SaveError(OSError):
    """A checkpoint could not be written; the message names it, the reason, and the last good checkpoint."""


class InterruptedSave(SaveError):
    """Another process was lost during a save; the file system is fine and a restart may succeed."""


class Checkpointer:
    """The checkpoints of one run, in DIRECTORY/STEP.

    A save is written to STEP.saving, sealed with a manifest (`bc2_jax.manifest`) and renamed to STEP: a folder named by
    a number is always complete. STEP.aside is a checkpoint that was damaged or discarded by a rewind; it is never read
    or deleted.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, pinned: int | None = None):
        """The checkpoint of step `pinned` is kept until `unpin`."""
        self.directory = directory.absolute()
        self.config, self.pinned = config, pinned
        self._permanent: dict[int, bool] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._verified: set[int] = set()

    def remove_leftovers(self) -> None:
        """Removes what a killed run left half-written or half-deleted; only for the owner of the run."""
        if jax.process_index() == 0:
            self._remove("*.saving*", "*.orbax-checkpoint-tmp*", "*.deleting")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; file contents are not verified."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and is_complete(p))

    def describe_newest(self) -> str:
        """The newest complete checkpoint as the end of a sentence; waits for the current save."""
        try:
            self.wait()
        except SaveError as error:
            _log.warning("%s", error)
        with contextlib.suppress(OSError):
            if steps := self.steps():
                return f"the last good checkpoint is {self.directory / str(steps[-1])}"
        return "there is no checkpoint before it"

    def latest_good(self, arrays: bool = True) -> int | None:
        """The newest step that passes verification (`verify`); None if nothing was saved yet.

        Logs each damaged checkpoint and leaves it in place (see `set_aside_after`). Raises DamagedCheckpoint if all are
        damaged. All processes call it; each reads a part of the files.
        """
        self.wait()
        problems: list[str] = []
        for step in first_decides(self._numbered):
            try:
                self.verify(step, arrays)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                continue
            for problem in problems:
                _log.warning("%s It is not used; the newest good checkpoint is that of step %d.", problem, step)
            return step
        if problems:
            raise DamagedCheckpoint(
                f"{self.directory} has no good checkpoint: {' '.join(problems)} Move them away to start again, or take "
                "one as it is with tools/checkpoints.py --seal."
            )
        return None

    def verify(self, step: int, arrays: bool = True) -> None:
        """Raises the same DamagedCheckpoint on all processes if a file of the step is not as it was written.

        With `arrays` = False the sizes of all files are compared, but only the hash of the metadata.
        """
        folder, problem = self.directory / str(step), ""
        try:
            if not is_complete(folder):
                raise DamagedCheckpoint(f"{folder} is not complete.")
            if arrays:
                manifest.verify(folder, jax.process_index(), jax.process_count())
            else:
                manifest.verify(folder, hashes=False)
                manifest.verify(folder, below="_CHECKPOINT_METADATA")
        except DamagedCheckpoint as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be read ({_reason(error)})."
        problem = any_text(problem)
        if problem:
            self._verified.discard(step)
            raise DamagedCheckpoint(problem)
        if arrays:
            self._verified.add(step)

    def set_aside_after(self, step: int) -> None:
        """Renames every checkpoint after `step`, damaged or not, to STEP.aside: the run resumes from `step`."""
        self.wait()
        if jax.process_index() == 0:
            for later in self._numbered():
                if later > step:
                    aside = _free_name(self.directory / f"{later}.aside")
                    (self.directory / str(later)).rename(aside)
                    _log.warning("%s is kept as %s and not used.", self.directory / str(later), aside.name)
        self._verified = {verified for verified in self._verified if verified <= step}
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")

    def save(self, step: int, params: Params, opt_state: Any, metadata: Metadata) -> None:
        """Starts a save and returns as soon as the arrays may change; first waits for the previous save.

        A checkpoint of the same step is replaced once the new one is complete. Raises SaveError if the save cannot
        start or the previous one failed.
        """
        self.wait()
        self._verified.discard(step)
        self._permanent[step] = metadata.permanent
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            with save_context():
                response = ocp.save_checkpointables_async(
                    self.directory / f"{step}.saving", {"params": params, "opt_state": opt_state},
                    custom_metadata=metadata.as_json(),
                )  # fmt: skip
        except Exception as error:  # of any kind: Orbax, TensorStore and JAX each have their own
            raise self._failed(step, error) from error
        self._saving = step, self._pool.submit(self._finish, step, response)

    def metadata(self, step: int) -> Metadata:
        return read_training_metadata(self.directory / str(step))

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """The arrays of a step in the layout of the given abstract trees (ShapeDtypeStructs with shardings).

        Verifies the files first and raises DamagedCheckpoint if one is not as it was written.
        """
        self.wait()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint sealed")
        if step not in self._verified:
            self.verify(step)
        return load_state(self.directory / str(step), params, opt_state)

    def wait(self) -> None:
        """Returns when all saves are on disk; raises SaveError if one failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:  # of any kind: Orbax, TensorStore and JAX each have their own
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Waits as `wait` does and ends the thread that saves."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _finish(self, step: int, response: ocp.AsyncResponse) -> None:
        """In the background, after all processes have written: process 0 seals, renames and removes old checkpoints."""
        response.result()
        if jax.process_index() != 0:
            return
        saving, folder = self.directory / f"{step}.saving", self.directory / str(step)
        manifest.write_manifest(saving)
        if folder.exists():
            folder.rename(_free_name(self.directory / f"{step}.deleting"))
        saving.rename(folder)
        sync(self.directory)
        self._remove_old()

    def unpin(self) -> None:
        """Treats the pinned checkpoint like any other from now on."""
        self.wait()
        self.pinned = None
        if jax.process_index() == 0:
            self._remove_old()

    def _remove_old(self) -> None:
        sealed = [old for old in self.steps() if (self.directory / str(old) / manifest.MANIFEST_NAME).is_file()]
        for old in sealed[: -self.config.keep_last]:
            if old != self.pinned and not self._is_permanent(old):
                (self.directory / str(old)).rename(_free_name(self.directory / f"{old}.deleting"))
        self._remove("*.deleting")

    def _is_permanent(self, step: int) -> bool:
        if step not in self._permanent:
            try:
                self._permanent[step] = self.metadata(step).permanent
            except (ValueError, OSError) as error:
                _log.warning("%s is kept: its metadata cannot be read (%s).", self.directory / str(step), error)
                self._permanent[step] = True
        return self._permanent[step]

    def _failed(self, step: int, error: Exception) -> SaveError:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._remove("*.saving*")  # they may be what fills the disk
        kind = InterruptedSave if _is_from_others(error) else SaveError
        return kind(
            f"{self.directory / str(step)} could not be saved ({_reason(error)}): the run stops; "
            f"{self.describe_newest()}."
        )

    def _numbered(self) -> list[int]:
        """Steps of all folders named as a checkpoint, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((int(p.name) for p in self.directory.iterdir() if p.name.isdigit()), reverse=True)

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in list(self.directory.glob(pattern)):
                shutil.rmtree(path)


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _is_from_others(error: BaseException) -> bool:
    """Whether the error is a lost connection between processes rather than an error of the file system."""
    error = _innermost(error)
    is_lost = isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError))  # Orbax raises the latter for the former
    return jax.process_count() > 1 and is_lost and not _REASONS.search(str(error))


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, without the context that Orbax and TensorStore add."""
    error = _innermost(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    text = " ".join(str(error).split()) or type(error).__name__
    if (match := _REASONS.search(text)) is not None:
        return match[0]
    return text[:300]


def save_context() -> ocp.Context:
    """The Orbax context for saving: each layer of a stacked array has its own chunks, so that conversion can read
    single layers."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def storage(path: tuple, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else None)

    context = ocp.Context()
    # If the folders cannot be created, the threads of a save would wait for them for minutes instead of failing.
    context.async_options.create_directories_asynchronously = False
    # Orbax measures its timeout by wall-clock time: a clock that jumps must not end a save. train.distributed.Watchdog
    # notices a save that hangs.
    context.async_options.timeout_secs = 10 * 365 * 86_400
    context.array.saving.scoped_storage_options_creator = storage
    return context


def load_state(path: Path, params: Params, opt_state: Any) -> tuple[Params, Any]:
    """The arrays of a training checkpoint in the layout of the given abstract trees."""
    items = ocp.load_checkpointables(path, {"params": params, "opt_state": opt_state})
    return items["params"], items["opt_state"]
