"""A training run from config to finished model; reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from bc2_jax.agreement import first_decides
from bc2_jax.checkpoint import TOKENIZER_NAME, Checkpointer
from bc2_jax.config import TrainConfig
from bc2_jax.data.bad_rows import BadRows
from bc2_jax.data.batch import batch_part, make_put
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches
from bc2_jax.data.row_order import record_row_order
from bc2_jax.sharding import make_mesh
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import distributed
from bc2_jax.train import metrics as report
from bc2_jax.train.goodput import Goodput, goodput_table, read_sessions
from bc2_jax.train.health import HealthMonitor, Steps
from bc2_jax.train.results import check_resumed, make_baselines, show_results
from bc2_jax.train.start import (
    check_attention,
    check_initial_model,
    check_same_model,
    check_tokenizer,
    choose_workdir,
    holds_checkpoints,
    initial_params,
    restore_state,
    tuned_options,
    use_compilation_cache,
    warn_of_other_rows,
)
from bc2_jax.train.step import init_state, make_eval_step, make_train_step, mean_metrics


class TrainResult(NamedTuple):
    """Where a run ended."""

    step: int
    fingerprint: str
    """SHA-256 of the parameters."""
    metrics: dict[str, float]
    """Those of the last step, with the last validation."""
    workdir: Path


def train(config: TrainConfig, command: str = "train.py", started: float | None = None) -> TrainResult:
    """Trains as `config` says; `command` is what the printed hints tell the user to run with Python.

    `started` is the time.monotonic() at which the program began: what came before this call is start-up time.

    Raises ValueError or FileNotFoundError for a run that cannot start, before anything is written, and
    FloatingPointError at a loss or gradient that is not finite; the checkpoints before it stay.
    """
    started = time.monotonic() if started is None else started
    # ---------------------------------------------------------------- devices
    distributed.start(config)
    use_compilation_cache(config.compilation_cache)
    config = config.resolve(jax.device_count())
    mesh = make_mesh(config.mesh)
    check_attention(config, mesh)
    console = Console(quiet=jax.process_index() != 0, highlight=False)

    # ---------------------------------------------------------------- what is there already
    workdir = Path(first_decides(lambda: str(choose_workdir(config))))
    if not holds_checkpoints(workdir):
        check_initial_model(config)
    # Closed whatever happens: its threads must not outlive an error that ends the program.
    checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint, config.data.tokens_per_step)
    with (
        distributed.Preemption() as preemption,
        distributed.Watchdog(config.distributed.step_timeout) as watchdog,
        contextlib.closing(checkpoints) as checkpointer,
    ):
        return _run(config, command, mesh, console, workdir, checkpointer, preemption, watchdog, started)


def _run(
    config: TrainConfig, command: str, mesh: Mesh, console: Console, workdir: Path, checkpointer: Checkpointer,
    preemption: distributed.Preemption, watchdog: distributed.Watchdog, started: float,
) -> TrainResult:  # fmt: skip
    watchdog.beat("the start")
    saved = first_decides(checkpointer.steps)
    if saved and config.resume == "never":
        raise ValueError(
            f"workdir = '{workdir}' already holds checkpoints up to step {saved[-1]}; "
            "pass --resume auto to go on from there, or another --workdir."
        )
    goodput = Goodput(workdir / "goodput.jsonl", started)
    with goodput.phase("restore"):
        start_step = goodput.start_step = checkpointer.latest_good() or 0
    if start_step > config.num_steps:
        raise ValueError(f"num_steps = {config.num_steps} is not valid: the run in '{workdir}' is at {start_step}.")
    metadata = checkpointer.metadata(start_step) if start_step else None
    if metadata is not None:
        check_same_model(config, metadata, workdir)
        warn_of_other_rows(config, metadata, start_step)

    # ---------------------------------------------------------------- data
    tokenizer = Tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    part = batch_part(mesh, jax.process_index())
    process = {"process_index": part.process_index, "process_count": part.process_count}
    bad_rows = BadRows(config.data.max_bad_rows)
    loader = make_train_loader(config.data, num_steps=config.num_steps, bad_rows=bad_rows, **process)
    iterator = make_train_iterator(loader)
    validation = make_validation_batches(config.data, config.data.global_batch_size, bad_rows=bad_rows, **process)
    row_order = record_row_order(config.data)
    put = make_put(config.data, mesh)

    with jax.set_mesh(mesh):
        # ------------------------------------------------------------ state
        if metadata is None:
            state = init_state(initial_params(config, mesh), config)
        else:
            with goodput.phase("restore"):
                state = restore_state(checkpointer, start_step, config, mesh)
            iterator.set_state(metadata["data"])
        watchdog.beat("the parameters were placed")

        # ------------------------------------------------------------ from here on, the workdir is written
        workdir.mkdir(parents=True, exist_ok=True)
        checkpointer.set_aside_after(start_step)
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1), encoding="utf-8")
            if not (workdir / TOKENIZER_NAME).exists():
                partial = workdir / f"{TOKENIZER_NAME}.partial"
                shutil.copyfile(config.data.tokenizer, partial)
                partial.replace(workdir / TOKENIZER_NAME)  # a killed run leaves it whole or not there
        report.print_tables(console, config, mesh)
        report.print_mixture(console, config)
        writer = report.MetricsWriter(workdir, start_step)
        throughput = report.Throughput(config, mesh)
        console.print(throughput.formula(), soft_wrap=True)
        counts = config.ngram_baselines and jax.process_index() == 0
        baselines = make_baselines(config, console) if counts else {}
        if metadata is None and config.init_from is not None:
            console.print(f"Parameters from {config.init_from}.", soft_wrap=True)
        if metadata is not None:
            console.print(f"Resumed at step {start_step} from {checkpointer.directory}.", soft_wrap=True)

        # ------------------------------------------------------------ compile
        display = report.ProgressDisplay(console, config, start_step)
        monitor = HealthMonitor(config, workdir, display.say)
        monitor.set_state(metadata and metadata.get("health"))
        resuming = start_step < config.num_steps
        batch = put(monitor.next_batch(start_step + 1, iterator) if resuming else validation[0])
        next_state = iterator.get_state()
        with goodput.phase("compile"):
            lowered = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch)
            train_step = lowered.compile(compiler_options=tuned_options(config, mesh))
        watchdog.beat("compilation")
        eval_step = jax.jit(make_eval_step(config))
        verified_step = config.num_steps - config.verify_resume_steps if config.verify_resume_steps else 0

        def evaluate(step: int) -> dict[str, float]:
            count = min(config.eval_batches or len(validation), len(validation))
            sums = []
            for i in range(count):
                sums.append(eval_step(state.params, put(validation[i])))
                jax.block_until_ready(sums[max(i - 1, 0)])  # not the newest: the devices have work meanwhile
                watchdog.beat(f"validation batch {i + 1} of {count} at step {step}")
            sums = jax.device_get(sums)
            total = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *sums)
            total = total._replace(largest_logit=max(float(x.largest_logit) for x in sums))
            means = mean_metrics(total, config.model.z_loss_weight)
            values = {f"validation_{name}": float(value) for name, value in means.items()} | bad_rows.metrics()
            display.say(
                f"step {step}  validation cross entropy {values['validation_cross_entropy']:.4f}, "
                f"accuracy {values['validation_accuracy']:.1%}"
            )
            return values

        def finish_step(step: int, step_metrics: dict[str, jax.Array]) -> dict[str, float]:
            """Waits for a step's metrics, checks and shows them."""
            values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
            watchdog.beat(f"step {step}")
            values |= monitor.observe(step, values, checkpointer.describe_newest) | throughput.step()
            values |= bad_rows.metrics()
            goodput.steps_done += 1
            display.show(step, values)
            return values

        def save() -> None:
            metadata = {"config": dataclasses.asdict(config), "data": data_state, "row_order": row_order}
            metadata["health"] = monitor.state()
            with goodput.phase("save"):
                checkpointer.save(step, state.params, state.opt_state, metadata)
            goodput.record(step)

        # ------------------------------------------------------------ loop
        pending: tuple[int, dict[str, jax.Array]] | None = None
        last: dict[str, float] = {}
        stopping = False
        steps = Steps(start_step, config.num_steps)
        try:
            if start_step == 0:
                with goodput.phase("evaluation"):
                    writer.write(0, evaluate(0))
            throughput.restart()
            goodput.enter("step")
            for step in steps:
                if step == config.profile_start:
                    jax.profiler.start_trace(str(workdir / "profile"))
                # Metrics of a step are fetched after the next one was dispatched: the devices never wait for the host.
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                    data_state = next_state
                    if step < config.num_steps:
                        with goodput.phase("data_wait"):
                            batch = put(monitor.next_batch(step + 1, iterator))
                        next_state = iterator.get_state()
                    if pending is not None:
                        writer.write(pending[0], finish_step(*pending))
                    pending = step, step_metrics
                if step == config.profile_start + config.profile_steps - 1 and config.profile_start:
                    jax.block_until_ready(step_metrics)
                    jax.profiler.stop_trace()
                is_last = step == config.num_steps
                is_kept = checkpointer.is_permanent(step)
                is_eval = is_last or step % config.eval_every == 0 or is_kept
                stopping = preemption.reached()
                is_save = is_last or is_kept or stopping or step == verified_step
                is_save = is_save or step % config.checkpoint.save_every == 0
                if is_eval or is_save:
                    # Nothing is saved before its step is known to be finite.
                    last, pending = finish_step(*pending) | report.memory_metrics(), None
                    is_sound = monitor.spike is None  # else it is gone behind
                    if stopping and is_sound:
                        save()  # before the evaluation: little time is left
                    if is_eval and is_sound:
                        with goodput.phase("evaluation"):
                            last |= evaluate(step)
                    writer.write(step, last | goodput.metrics())
                    if is_save and is_sound and not stopping:
                        save()
                    throughput.restart()
                if monitor.spike is not None:
                    with goodput.phase("restore"):
                        step = monitor.rewind(checkpointer)
                        del state, step_metrics  # before memory is needed for those restored
                        state, pending = restore_state(checkpointer, step, config, mesh), None
                        batch = put(monitor.next_batch(step + 1, iterator))
                        next_state = iterator.get_state()
                    writer.close()
                    writer = report.MetricsWriter(workdir, step)
                    steps.done = step
                    watchdog.beat(f"going back to step {step}")
                    throughput.restart()
                if stopping:
                    break
        finally:
            display.close()
            writer.close()
            watchdog.beat("the end of the loop")
            with goodput.phase("save"):
                checkpointer.wait()
            goodput.record(steps.done)
            goodput.enter("other")
            preemption.close()

        if stopping:
            raise distributed.Preempted(
                f"Stopped by SIGTERM: step {step} is saved in {checkpointer.directory}; go on with --resume auto."
            )

        # ------------------------------------------------------------ results
        digest = report.fingerprint(state.params)
        if start_step < verified_step:
            again = restore_state(checkpointer, verified_step, config, mesh)
            iterator.set_state(checkpointer.metadata(verified_step)["data"])
            for step in range(verified_step + 1, config.num_steps + 1):
                again, _ = train_step(again, put(monitor.next_batch(step, iterator)))
            check_resumed(verified_step, report.fingerprint(again.params), digest, display.say)
        checkpoint = checkpointer.directory / str(config.num_steps)
        goodput.record(config.num_steps)
        if jax.process_index() == 0:
            console.print(goodput_table(read_sessions(goodput.path)))
        show_results(config, checkpoint, state.params, baselines, tokenizer, display.say, command)
        display.say(f"step {config.num_steps}")
        display.say(f"parameters sha256 {digest}")
    iterator.close()
    return TrainResult(config.num_steps, digest, last, workdir)
