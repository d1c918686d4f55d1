"""The processes of a run: how they start, agree, are stopped from outside, and notice that one of them hangs."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import jax
from jax.experimental import multihost_utils

from bc2_jax.config import DistributedConfig, MeshConfig
from bc2_jax.cpu import has_tpu, keep_heap
from bc2_jax.sharding import use_cpu_devices

EXIT_ERROR = 1
EXIT_HUNG = 70
"""No progress for `distributed.step_timeout` (EX_SOFTWARE of sysexits.h)."""
EXIT_LOST = 76
"""Of a run of several processes: another one is gone, or something failed that starting again may mend."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C, as shells count it; with its last step saved, if one was done."""
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM with its last step saved: start it again with --resume auto (EX_TEMPFAIL of sysexits.h)."""


class Devices(Protocol):
    """What says which devices compute, as a RunConfig does."""

    @property
    def mesh(self) -> MeshConfig: ...

    @property
    def distributed(self) -> DistributedConfig: ...


def start(config: Devices) -> None:
    """Joins the other processes of the run, if there are any; to be called before any JAX computation.

    `mesh.num_cpu_devices` are the devices of one process. Raises ValueError if JAX already computes. JAX
    aborts the process if the others don't come within `distributed.start_timeout`.
    """
    if config.mesh.num_cpu_devices:
        use_cpu_devices(config.mesh.num_cpu_devices)
        keep_heap()
    distributed = config.distributed
    explicit = distributed.num_processes is not None
    if jax.distributed.is_initialized() or not (
        explicit or (not config.mesh.num_cpu_devices and count_tpu_hosts() > 1)
    ):
        return
    logging.getLogger(__name__).info(
        "Waiting up to %d s for all processes%s.", distributed.start_timeout,
        f": this is {distributed.process_id} of {distributed.num_processes}, 0 is at {distributed.coordinator_address}"
        if explicit else "",
    )  # fmt: skip
    try:
        jax.distributed.initialize(
            distributed.coordinator_address,
            distributed.num_processes,
            distributed.process_id,
            # Where nothing is given JAX finds it out; where it is, a cluster's environment is not asked.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=distributed.start_timeout,
            heartbeat_timeout_seconds=distributed.heartbeat_timeout,
            # An end waits for the others' at most as long as a silent process counts as alive.
            shutdown_timeout_seconds=distributed.heartbeat_timeout,
        )
        if config.mesh.num_cpu_devices:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
    except RuntimeError as error:
        if "before" in str(error):  # any JAX calls
            raise ValueError(
                f"distributed.num_processes = {distributed.num_processes} is not possible: JAX already computes in "
                "this process; join the others before."
            ) from error
        raise


def count_tpu_hosts() -> int:
    """Hosts of the Cloud TPU pod this runs on, over all its slices; 1 without TPU.

    The environment (GKE) or, on a TPU VM, the metadata server tells, as for `jax.distributed.initialize()`:
    jax/_src/clusters/cloud_tpu_cluster.py.
    """
    if not has_tpu():
        return 1
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if workers is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        workers = _tpu_metadata("worker-network-endpoints")
        environment = dict(
            line.replace("'", "").split(": ", 1) for line in _tpu_metadata("tpu-env").splitlines() if ": " in line
        )
        slices = slices or environment.get("MEGASCALE_NUM_SLICES")
    return len((workers or "").split(",")) * int(slices or 1)


def _tpu_metadata(attribute: str) -> str:
    """An attribute of this VM; empty where there is no metadata server or it has none of this name."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except OSError:  # no such name, no answer, or a status of 4xx
        return ""


def leave(code: int, hint: str = "the checkpoints stay, go on with --resume auto") -> NoReturn:
    """Ends this process after an error without waiting for the others, who may wait for it in turn; `hint` says how to
    go on."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends, and the others with it. The log with the "
        f"first error shows the cause; {hint}.",
        file=sys.stderr,
    )  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # JAX aborts the others as soon as process 0 is gone; where all have the same error, let them tell it.
        time.sleep(2)
    os._exit(code)


class Preempted(Exception):
    """The run was stopped by a signal; its last step is saved."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Preemption:
    """Notices SIGTERM, which Cloud TPU, Kubernetes and batch systems send before they take a machine away, and Ctrl-C.

    With several processes JAX's preemption service passes it on, and all of them stop at the same step. A second
    signal, of several processes one after they have agreed, ends the process at once. Use as a context manager, in the
    main thread.
    """

    def __init__(self) -> None:
        self._noticed = self._interrupted = False
        self._calls = 0
        self._shared = jax.distributed.is_initialized()  # JAX then handles the signal
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if self._in_main_thread:
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            if not self._shared:
                signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def catch_interrupt(self) -> None:
        """From here on Ctrl-C too lets a step end and be saved; before, there is nothing to wait for."""
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._notice)

    def close(self) -> None:
        """From here on both signals mean what they did before."""
        if self._in_main_thread:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            self._interrupted = True
            os.write(2, b"\nStopping after this step, which is saved; Ctrl-C again ends the run at once.\n")
            if self._shared:
                os.kill(os.getpid(), signal.SIGTERM)  # the others learn of it from JAX
                return
        self._noticed = True

    @property
    def noticed(self) -> bool:
        """Whether `reached` has told that the run is to stop."""
        return self._noticed

    def reached(self) -> bool:
        """Whether to stop at the next step; every process calls it equally often and gets the same answer."""
        # Not the step: a run may go back to an earlier one, and after a signal before the first call JAX stops at 1.
        if not self._noticed:
            self._calls += 1
            if self._shared and multihost_utils.reached_preemption_sync_point(self._calls):
                self._noticed = True
                self.close()
        return self._noticed

    def stopped(self, step: int, directory: Path) -> Preempted:
        """What ends the run whose `step` is saved in `directory`."""
        cause, code = ("Ctrl-C", EXIT_INTERRUPTED) if self._interrupted else ("SIGTERM", EXIT_PREEMPTED)
        saved = f"step {step} is saved in {directory}" if step else "no step was done yet"
        return Preempted(f"Stopped by {cause}: {saved}; go on with --resume auto.", code)


class Watchdog:
    """Ends the process with EXIT_HUNG, and says why, if the loop shows no progress for `timeout` seconds (0: never).

    A collective waits for ever for a process that is stopped, and no exception comes from there. Use as a context
    manager.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._last: tuple[float, str] | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def beat(self, done: str) -> None:
        """There was progress: `done`, as in "step 7". From the first time on it is watched."""
        self._last = time.monotonic(), done

    def pause(self) -> None:
        """Not watched until the next progress."""
        self._last = None

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            last = self._last
            if last is not None and time.monotonic() - last[0] > self.timeout:
                self._diagnose(time.monotonic() - last[0], last[1])

    def _diagnose(self, silent: float, done: str) -> NoReturn:
        index, count = jax.process_index(), jax.process_count()
        others = (
            "Look for the process that is gone, stopped or behind: its log ends before the others' or shows another "
            "error, its host does not answer, or its main thread is elsewhere than theirs. "
            if count > 1
            else "Look at the data's storage and at the device. "
        )
        print("Where each thread is, the newest call first:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(
            f"error: process {index} of {count} hangs: no progress for {silent:.0f} s after {done} "
            f"(distributed.step_timeout = {self.timeout:g}). {others}The checkpoints stay; go on with --resume auto.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(EXIT_HUNG)


def make_progress(preemption: Preemption, watchdog: Watchdog, where: str = "") -> Callable[[str], bool]:
    """What is told how far something is, `done + where`; False as soon as the run is to stop."""

    def progress(done: str) -> bool:
        watchdog.beat(done + where)
        return not preemption.reached()

    return progress
