"""The training loop of every kind of run: resume, compile, step, evaluate, save, rewind, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from bc2_jax.agreement import first_decides, require_agreement
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import RunConfig
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.metadata import Metadata
from bc2_jax.sharding import make_mesh
from bc2_jax.train import distributed
from bc2_jax.train.evaluation import evaluate_and_examine
from bc2_jax.train.expendable import Expendable, Profiler
from bc2_jax.train.goodput import Goodput, goodput_table, read_sessions
from bc2_jax.train.health import HealthMonitor, Steps
from bc2_jax.train.job import BatchError, Job, TrainState, make_eval_step
from bc2_jax.train.kinds import with_tasks
from bc2_jax.train.metrics import ProgressDisplay, Throughput, fingerprint, make_writer, memory_metrics
from bc2_jax.train.resume import find_checkpoint, restore_state, verify_resume
from bc2_jax.train.schedule import Schedule
from bc2_jax.train.start import check_attention, describe_start, own_workdir, record_config, use_compilation_cache
from bc2_jax.train.startup import RunResult, Start, StartUp, compile_step
from bc2_jax.train.wandb_run import check_wandb

Config = TypeVar("Config", bound=RunConfig)


MakeJob = Callable[[Config, Start], Job]


def run(
    config: Config, make_job: MakeJob[Config], command: str = "bc2 train", started: float | None = None
) -> RunResult:
    """Runs the job of the config, with its mesh resolved, from the newest good checkpoint.

    `started` is the time.monotonic() at which the program began; the time until this call counts as start-up.

    Raises ValueError or FileNotFoundError before anything is written if the run cannot start; FloatingPointError for a
    loss or gradient that is not finite (checkpoints are kept); and distributed.Preempted after SIGTERM or Ctrl-C, with
    the last step saved.
    """
    started = started or time.monotonic()
    clock = StartUp(started)
    with clock.phase("agreement"):
        distributed.start(config)
        require_agreement(describe_start(config))
    use_compilation_cache(config.compilation_cache)
    with clock.phase("mesh"):
        config = config.resolve(jax.device_count())
        mesh = make_mesh(config.mesh)
    check_attention(config, mesh)
    check_wandb(config)
    expendable = Expendable()
    verified = config.num_steps - config.verify_resume_steps if config.verify_resume_steps else None
    with (
        distributed.Preemption() as preemption,
        distributed.Watchdog(config.distributed.step_timeout) as watchdog,
        own_workdir(config) as workdir,
        # Closed in any case: its threads must not outlive an error that ends the program.
        contextlib.closing(Checkpointer(workdir / "checkpoints", config.checkpoint, verified)) as saved,
        jax.set_mesh(mesh),
    ):
        watchdog.beat("the start")
        goodput = Goodput(workdir / "goodput.jsonl", started)
        display = ProgressDisplay(config, expendable)
        progress = distributed.make_progress(preemption, watchdog)

        def make(verified: bool) -> tuple[_Loop, int, Metadata | None]:
            with clock.phase("checkpoint"):
                step, metadata = find_checkpoint(config, saved, goodput, verified)
            start = Start(mesh, workdir, step, metadata, display.console, display.say, command, expendable, progress)
            with clock.phase("data"):
                job = with_tasks(config, start, make_job(config, start))
                require_agreement(job.metadata)
            loop = _Loop(config, job, mesh, saved, preemption, watchdog, goodput, display, expendable, clock)
            return loop, step, metadata

        # The newest checkpoint is verified beside the compilation. Until it is restored nothing is written.
        loop, step, metadata = make(verified=False)
        try:
            loop.start(step, metadata)
        except DamagedCheckpoint:
            if metadata is None:  # it is the model to start from
                raise
            loop.job.batches.close()
            loop, step, metadata = make(verified=True)
            loop.start(step, metadata)
        loop.compile()
        loop.take_steps()
        return loop.finish(step)


class _Loop:
    """The state of a run in progress and the operations on it."""

    def __init__(
        self, config: RunConfig, job: Job, mesh: Mesh, checkpointer: Checkpointer,
        preemption: distributed.Preemption, watchdog: distributed.Watchdog, goodput: Goodput, display: ProgressDisplay,
        expendable: Expendable, clock: StartUp,
    ):  # fmt: skip
        self.config, self.job, self.mesh = config, job, mesh
        self.checkpointer, self.workdir = checkpointer, goodput.path.parent
        self.preemption, self.watchdog, self.goodput, self.display = preemption, watchdog, goodput, display
        self.expendable, self.clock = expendable, clock
        self.monitor = HealthMonitor(config.health, self.workdir, display.say, expendable)
        self.profiler = Profiler(config.profile_start, config.profile_steps, self.workdir / "profile", expendable)
        self.throughput = Throughput(config.tokens_per_step, job.flops_per_step, job.flops_formula, mesh)
        self.is_compiled = False
        self.last: dict[str, float] = {}
        """Metrics of the last step that was evaluated or saved."""

    # ----------------------------------------------------------------------------------------------- start

    def start(self, step: int, metadata: Metadata | None) -> None:
        """Restores or makes the state of `step`; from here on files are written to the workdir."""
        evaluated = len(self.job.validation) > 0 or self.job.examine is not None
        self.schedule = Schedule(self.config, evaluated, step, 0 if metadata is None else metadata.tokens)
        self.steps = Steps(step, self.config.num_steps)
        if metadata is None:
            with self.clock.phase("initial state"):
                self.state = self.job.init_state()
        else:
            self.job.batches.seek(metadata.data)
            self.monitor.set_state(metadata.health)
            self._restore(step)
        self.watchdog.beat("the parameters were placed")
        self.workdir.mkdir(parents=True, exist_ok=True)  # on every host
        self.checkpointer.remove_leftovers()
        self.checkpointer.set_aside_after(step)
        with self.expendable.attempt("config.json"):
            record_config(self.config, self.workdir)
        self.job.begin(self.workdir)
        self.display.say(self.throughput.formula())
        if metadata is not None:
            after = f", after {metadata.tokens:,} tokens," if metadata.tokens else ""
            self.display.say(f"Resumed at step {step}{after} from {self.checkpointer.directory}.")
        self.writer = make_writer(self.config, self.workdir, step, self.expendable)

    def _restore(self, step: int) -> None:
        """Restores the state; meanwhile makes the first batch and compiles the step, for which shapes suffice."""

        def restore() -> TrainState:
            with jax.set_mesh(self.mesh), self.clock.phase("restore"):
                return restore_state(self.checkpointer, step, self.job.abstract_state)

        # Processes must start programs on their devices in one order: with several, only one thread starts any.
        is_alone = jax.process_count() == 1
        with self.goodput.phase("restore"), ThreadPoolExecutor(1, thread_name_prefix="restore") as pool:
            if self.job.samples or step == self.config.num_steps:  # a batch needs the values; or only `finish` is left
                self.state = restore()
                return
            self.state = self.job.abstract_state
            if not is_alone:
                self._next_batch(step + 1)
            restoring = pool.submit(restore)
            try:
                if is_alone:
                    self._next_batch(step + 1)
                self._compile()
            finally:  # its error comes first
                self.state = restoring.result()

    def _compile(self) -> None:
        if self.batch is not None:  # else the run is to stop
            with self.goodput.phase("compile"):
                self.train_step = compile_step(self.config, self.job, self.mesh, self.state, self.batch, self.clock)
            self.is_compiled = True

    def compile(self) -> None:
        """Makes the first batch and compiles the step, unless that was done beside the restore."""
        self.display.start(self.steps.done)
        self.eval_step = jax.jit(make_eval_step(self.job.objective))
        if not self.is_compiled and self.steps.done < self.config.num_steps:  # else only `finish` is left
            self._next_batch(self.steps.done + 1)
            self._compile()
        self.watchdog.beat("compilation")

    # ---------------------------------------------------------------------------------------------- steps

    def take_steps(self) -> None:
        """Trains until num_steps. Raises Preempted, with the last step saved, if a signal stops it."""
        config, checkpointer = self.config, self.checkpointer
        pending: tuple[int, dict[str, jax.Array]] | None = None
        stopping, failed = False, None  # failed: the error while making the next batch
        self.preemption.catch_interrupt()
        try:
            with self.clock.phase("evaluation"):
                self._evaluate_if_due()
            self.throughput.restart()
            self.clock.begin_steps()
            self.goodput.enter("step")
            for step in self.steps:
                if self.batch is None:  # stopped before the first batch
                    raise self.preemption.stopped(step - 1, checkpointer.directory)
                self.profiler.before(step)
                # A step's metrics are fetched after the next step was dispatched, so the devices never wait for the
                # host. A run that samples needs this step's state for its next batch, so it must wait.
                dispatched = time.perf_counter()
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.train_step(self.state, self.job.frozen, self.batch)
                    saved_position = self.position
                    values = None
                    if self.job.samples:
                        values = self._finish_step(step, metrics)
                        values["update_seconds"] = time.perf_counter() - dispatched
                    # Checked before as well: making a batch may take longer than the time left after SIGTERM.
                    if step < config.num_steps and not self.preemption.reached():
                        try:
                            self._next_batch(step + 1)
                        except BatchError as error:  # raised when this step is saved
                            failed = error
                    if pending is not None:
                        self.writer.write(pending[0], self._finish_step(*pending))
                    pending = (step, metrics) if values is None else None
                self.profiler.after(step, metrics)
                is_eval = self.schedule.is_evaluated(step)
                stopping = self.preemption.reached() or failed is not None
                is_save = stopping or self.schedule.is_saved(step, checkpointer.pinned)
                if is_eval or is_save:
                    # A step is saved only once it is known to be finite and will not be discarded by a rewind.
                    values, pending = values or self._finish_step(step, metrics), None
                    finished = time.perf_counter()
                    self.last = values | memory_metrics()
                    self.writer.write(step, self.last | self.goodput.metrics())
                    is_sound = self.monitor.spike is None
                    if is_save and is_sound:
                        self._save(step, saved_position)
                    if is_eval and is_sound and not stopping:
                        stopping = not self._evaluate(step)
                        if stopping and not is_save:
                            self._save(step, saved_position)
                    self.throughput.leave_out(time.perf_counter() - finished)
                elif values is not None:
                    self.writer.write(step, values)
                if self.monitor.spike is not None:
                    del metrics  # frees memory for the restored state
                    pending = None
                    with self.goodput.phase("restore"):
                        step = self._rewind()
                    stopping |= self.preemption.noticed
                if stopping:
                    break
        finally:
            self._end_steps()
        if stopping:
            raise failed or self.preemption.stopped(step, checkpointer.directory)

    def _evaluate_if_due(self) -> None:
        """Before the first step, and after a stop between the save and the evaluation of a step."""
        done = self.steps.done
        if self.schedule.is_evaluated(done) and not first_decides(lambda: self.writer.has_evaluation(done)):
            self._evaluate(done)

    def _end_steps(self) -> None:
        self.profiler.close()
        self.display.close()
        self.writer.close()
        self.watchdog.beat("the end of the loop")
        with self.goodput.phase("save"):
            self.checkpointer.wait()
        self.goodput.record(self.steps.done)
        self.goodput.enter("other")
        self.preemption.close()

    def _next_batch(self, step: int) -> None:
        """Makes the batch of a step; it is None if the run is to stop."""
        with self.goodput.phase("rollout" if self.job.samples else "data_wait"), self.clock.phase("batch"):
            self.batch = self.job.batches.next(step, self.state)
        self.position: dict[str, Any] = self.job.batches.position()

    def _finish_step(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a step's metrics, judges and shows them."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.watchdog.beat(f"step {step}")
        judged = self.monitor.observe(step, values)
        if self.monitor.stop is not None:
            self._stop(step, values, self.monitor.stop)
        values |= judged | self.throughput.step() | self.job.batches.metrics(step) | self.expendable.metrics()
        self.job.check(step, values)
        if self.config.tokens_per_step:
            values["trained_tokens"] = float(self.schedule.tokens(step))
        self.goodput.steps_done += 1
        self.display.show(step, values)
        self.clock.end(self.display.say, self.goodput)
        return values

    def _stop(self, step: int, values: dict[str, float], name: str) -> None:
        # JSON has no NaN; this file keeps the bits.
        about = {"seed": self.config.seed} | {f"metric_{name}": value for name, value in values.items()}
        path = None
        with self.expendable.attempt("bad batches"):
            path = self.job.batches.save(step, self.workdir, about)
        where = self.checkpointer.describe_newest() + (f"; its batch is saved in {path}" if path is not None else "")
        raise FloatingPointError(f"{name} is {values[name]} at step {step}: the run stops; {where}.")

    def _evaluate(self, step: int) -> bool:
        """Writes the validation metrics, named validation_...; False if the run is to stop before their end.

        An evaluation that fails leaves no metrics.
        """
        job, progress = self.job, distributed.make_progress(self.preemption, self.watchdog, f" at step {step}")
        with self.goodput.phase("evaluation"), self.expendable.attempt("evaluations"):
            values = evaluate_and_examine(
                job, self.eval_step, step, self.state.params, self.config.eval_batches, progress, self.expendable,
                self.display.say,
            )  # fmt: skip
            if values is None:
                self.display.say(f"step {step}  the run is stopping: the next start does this evaluation")
                return False
            values |= job.batches.metrics(step)
            self.last |= values
            self.writer.write(step, values)
        return True

    # ----------------------------------------------------------------------------------------- save, rewind

    def _save(self, step: int, position: dict[str, Any]) -> None:
        config, schedule = dataclasses.asdict(self.config), self.schedule
        metadata = Metadata(
            config, position, self.monitor.state(), self.job.metadata, schedule.tokens(step),
            schedule.is_permanent(step),
        )  # fmt: skip
        with self.goodput.phase("save"):
            self.checkpointer.save(step, self.state.params, self.state.opt_state, metadata)
        self.goodput.record(step)

    def _rewind(self) -> int:
        """Rewinds to a checkpoint before a spike of the loss and skips the spike's batches; returns the step.

        Sets newer checkpoints aside. Batches between the checkpoint and the spike are read again, in order. All
        processes call it. Raises FloatingPointError if the run may not rewind again or has no earlier checkpoint.
        """
        monitor, checkpointer = self.monitor, self.checkpointer
        assert (spike := monitor.spike) is not None
        checkpointer.wait()
        monitor.check_rewind(first_decides(checkpointer.steps), checkpointer.directory)
        skipped = self.job.batches.skip(spike.first_step, spike.last)
        checkpointer.set_aside_after(spike.first_step - 1)
        good = checkpointer.latest_good() or 0  # raises where none is good
        metadata = checkpointer.metadata(good)
        del self.state
        self.state = restore_state(checkpointer, good, self.job.abstract_state)
        self.job.batches.seek(metadata.data)
        self._next_batch(good + 1)
        monitor.rewound(good, metadata.health, skipped)
        self.writer.close()
        self.writer = make_writer(self.config, self.workdir, good, self.expendable)
        self.steps.done = good
        self.schedule = self.schedule._replace(resumed_at=good, tokens_before=metadata.tokens)
        self.watchdog.beat(f"rewinding to step {good}")
        self.throughput.restart()
        return good

    # ------------------------------------------------------------------------------------------------- end

    def finish(self, start_step: int) -> RunResult:
        """Verifies the resume if configured, then passes the trained parameters to the job."""
        config, job, say = self.config, self.job, self.display.say
        digest = fingerprint(self.state.params)
        if (verified := self.checkpointer.pinned) is not None:
            if start_step < verified:
                verify_resume(job, self.train_step, self.checkpointer, verified, config.num_steps, digest, say)
            else:
                say(f"Exact resume was not verified: this start began at step {start_step}, not before {verified}.")
            self.checkpointer.unpin()
        self.goodput.record(config.num_steps)
        if jax.process_index() == 0:
            with self.expendable.attempt("tables"):
                self.display.console.print(goodput_table(read_sessions(self.goodput.path)))
        self.job.finish(self.checkpointer.directory / str(config.num_steps), self.state.params)
        say(f"step {config.num_steps}")
        say(f"parameters sha256 {digest}")
        if summary := self.expendable.summary():
            say(summary)
        self.job.batches.close()
        return RunResult(config.num_steps, digest, self.last, self.workdir)
