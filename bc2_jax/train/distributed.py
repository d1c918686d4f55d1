"""The processes of a run: start, preemption, a watchdog for hangs, exit codes."""

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
"""With several processes: another one is gone, or an error occurred that a restart may fix."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C, with the last step saved if there was one."""
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM with the last step saved: restart with --resume auto (EX_TEMPFAIL of sysexits.h)."""


class Devices(Protocol):
    """A RunConfig, or anything else with these two configs."""

    @property
    def mesh(self) -> MeshConfig: ...

    @property
    def distributed(self) -> DistributedConfig: ...


def start(config: Devices) -> None:
    """Joins the other processes of the run, if any; call it before the first JAX computation.

    `mesh.num_cpu_devices` counts the devices of one process. Raises ValueError if JAX already computes. JAX aborts the
    process if the others do not join within `distributed.start_timeout`.
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
            # Without arguments JAX detects the cluster; with them the environment is ignored.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=distributed.start_timeout,
            heartbeat_timeout_seconds=distributed.heartbeat_timeout,
            # A process that ends waits for the others at most as long as a silent one counts as alive.
            shutdown_timeout_seconds=distributed.heartbeat_timeout,
        )
        if config.mesh.num_cpu_devices:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
    except RuntimeError as error:
        if "before" in str(error):  # any JAX calls
            raise ValueError(
                f"distributed.num_processes = {distributed.num_processes} is not possible: JAX already computes in "
                "this process; join the others first."
            ) from error
        raise


def count_tpu_hosts() -> int:
    """Hosts of this Cloud TPU pod over all slices; 1 without TPU.

    Read from the environment (GKE) or from the metadata server of a TPU VM, as `jax.distributed.initialize()` does:
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
    """An attribute of this VM; '' without a metadata server or without the attribute."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except OSError:  # no such name, no answer, or a status of 4xx
        return ""


def leave(code: int, hint: str = "the checkpoints are kept, resume with --resume auto") -> NoReturn:
    """Ends this process after an error without waiting for the others, which may wait for it; `hint` says how to
    resume."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends, and the others with it. The first error "
        f"in the logs shows the cause; {hint}.",
        file=sys.stderr,
    )  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # JAX aborts the others as soon as process 0 is gone; give them time to print the same error.
        time.sleep(2)
    os._exit(code)


class Preempted(Exception):
    """The run was stopped by a signal; its last step is saved."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Preemption:
    """Notices Ctrl-C and SIGTERM, which Cloud TPU, Kubernetes and batch systems send before they take a machine away.

    With several processes, JAX's preemption service forwards the signal and all stop at the same step. A second signal
    ends the process at once (with several, once they have agreed on the step). A context manager for the main thread.
    """

    def __init__(self) -> None:
        self.noticed = False
        """Whether the run is to stop, as `reached` reported it."""
        self._interrupted = False
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
        """From now on Ctrl-C also lets the current step end and be saved."""
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._notice)

    def close(self) -> None:
        """Restores the previous signal handlers."""
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
        self.noticed = True

    def reached(self) -> bool:
        """Whether to stop at the next step. Every process calls it equally often and gets the same answer."""
        # Not the step, since a run may rewind; after a signal before the first call JAX stops at 1.
        if not self.noticed:
            self._calls += 1
            if self._shared and multihost_utils.reached_preemption_sync_point(self._calls):
                self.noticed = True
                self.close()
        return self.noticed

    def stopped(self, step: int, directory: Path) -> Preempted:
        """The exception that ends the run whose `step` is saved in `directory`."""
        cause, code = ("Ctrl-C", EXIT_INTERRUPTED) if self._interrupted else ("SIGTERM", EXIT_PREEMPTED)
        saved = f"step {step} is saved in {directory}" if step else "no step was done yet"
        return Preempted(f"Stopped by {cause}: {saved}; resume with --resume auto.", code)


class Watchdog:
    """Ends the process with EXIT_HUNG and a diagnosis after `timeout` seconds without progress (0: never).

    A collective waits forever, without an exception, for a process that is stopped. A context manager.
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
        """Reports progress: `done`, as in "step 7". Watching starts with the first call."""
        self._last = time.monotonic(), done

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            last = self._last
            if last is not None and time.monotonic() - last[0] > self.timeout:
                self._diagnose(time.monotonic() - last[0], last[1])

    def _diagnose(self, silent: float, done: str) -> NoReturn:
        index, count = jax.process_index(), jax.process_count()
        others = (
            "Look for the process that is gone, stopped or behind: its log ends earlier or shows another error, its "
            "host does not answer, or its main thread is at another place. "
            if count > 1
            else "Look at the data's storage and at the device. "
        )
        print("Stack of each thread, the newest call first:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(
            f"error: process {index} of {count} hangs: no progress for {silent:.0f} s after {done} "
            f"(distributed.step_timeout = {self.timeout:g}). {others}Resume with --resume auto.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(EXIT_HUNG)


def make_progress(preemption: Preemption, watchdog: Watchdog, where: str = "") -> Callable[[str], bool]:
    """A function that reports progress, `done + where`, and returns False once the run is to stop."""

    def progress(done: str) -> bool:
        watchdog.beat(done + where)
        return not preemption.reached()

    return progress
