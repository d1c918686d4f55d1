"""A training run from config to finished model; reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from bc2_jax.checkpoint import TOKENIZER_NAME, Checkpointer
from bc2_jax.config import TrainConfig
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches
from bc2_jax.sharding import make_mesh
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import distributed
from bc2_jax.train import metrics as report
from bc2_jax.train.results import check_resumed, make_baselines, show_results
from bc2_jax.train.start import (
    batch_part,
    check_attention,
    check_initial_model,
    check_same_model,
    check_tokenizer,
    choose_workdir,
    holds_checkpoints,
    initial_params,
    make_put,
    restore_state,
    tuned_options,
    use_compilation_cache,
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


def train(config: TrainConfig, command: str = "train.py") -> TrainResult:
    """Trains as `config` says; `command` is what the printed hints tell the user to run with Python.

    Raises ValueError or FileNotFoundError for a run that cannot start, before anything is written, and
    FloatingPointError at a loss or gradient that is not finite; the checkpoints before it stay.
    """
    # ---------------------------------------------------------------- devices
    distributed.start(config)
    use_compilation_cache(config.compilation_cache)
    config = config.resolve(jax.device_count())
    mesh = make_mesh(config.mesh)
    check_attention(config, mesh)
    console = Console(quiet=jax.process_index() != 0, highlight=False)

    # ---------------------------------------------------------------- what is there already
    workdir = Path(distributed.first_decides(lambda: str(choose_workdir(config))))
    if not holds_checkpoints(workdir):
        check_initial_model(config)
    # Closed whatever happens: its threads must not outlive an error that ends the program.
    checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint, config.data.tokens_per_step)
    with distributed.Preemption() as preemption, contextlib.closing(checkpoints) as checkpointer:
        return _run(config, command, mesh, console, workdir, checkpointer, preemption)


def _run(
    config: TrainConfig, command: str, mesh: Mesh, console: Console, workdir: Path, checkpointer: Checkpointer,
    preemption: distributed.Preemption,
) -> TrainResult:  # fmt: skip
    saved = distributed.first_decides(checkpointer.steps)
    if saved and config.resume == "never":
        raise ValueError(
            f"workdir = '{workdir}' already holds checkpoints up to step {saved[-1]}; "
            "pass --resume auto to go on from there, or another --workdir."
        )
    start_step = checkpointer.latest_good() or 0
    if start_step > config.num_steps:
        raise ValueError(f"num_steps = {config.num_steps} is not valid: the run in '{workdir}' is at {start_step}.")
    metadata = checkpointer.metadata(start_step) if start_step else None
    if metadata is not None:
        check_same_model(config, metadata, workdir)

    # ---------------------------------------------------------------- data
    tokenizer = Tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    part = batch_part(mesh, jax.process_index())
    process = {"process_index": part.process_index, "process_count": part.process_count}
    iterator = make_train_iterator(make_train_loader(config.data, num_steps=config.num_steps, **process))
    validation = make_validation_batches(config.data, config.data.global_batch_size, **process)
    put = make_put(config, mesh)

    with jax.set_mesh(mesh), distributed.Watchdog(config.distributed.step_timeout) as watchdog:
        # ------------------------------------------------------------ state
        if metadata is None:
            state = init_state(initial_params(config, mesh), config)
        else:
            state = restore_state(checkpointer, start_step, config, mesh)
            iterator.set_state(metadata["data"])

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
        batch = put(next(iterator)) if start_step < config.num_steps else put(validation[0])
        next_state = iterator.get_state()
        lowered = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch)
        train_step = lowered.compile(compiler_options=tuned_options(config, mesh))
        eval_step = jax.jit(make_eval_step(config))
        display = report.ProgressDisplay(console, config, start_step)
        verified_step = config.num_steps - config.verify_resume_steps if config.verify_resume_steps else 0

        def evaluate(step: int) -> dict[str, float]:
            count = min(config.eval_batches or len(validation), len(validation))
            sums = []
            for i in range(count):
                sums.append(eval_step(state.params, put(validation[i])))
                jax.block_until_ready(sums[max(i - 1, 0)])  # not the newest: the devices have work meanwhile
                watchdog.beat(f"validation batch {i + 1} of {count} at step {step}")
            total = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *sums)
            means = mean_metrics(total, config.model.z_loss_weight)
            values = {f"validation_{name}": float(value) for name, value in means.items()}
            display.say(
                f"step {step}  validation cross entropy {values['validation_cross_entropy']:.4f}, "
                f"accuracy {values['validation_accuracy']:.1%}"
            )
            return values

        def finish_step(step: int, step_metrics: dict[str, jax.Array]) -> dict[str, float]:
            """Waits for a step's metrics, checks and shows them."""
            values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
            watchdog.beat(f"step {step}")
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    checkpointer.wait()
                    good = max(checkpointer.steps(), default=None)
                    where = "there is no checkpoint before it"
                    if good is not None:
                        where = f"the last good checkpoint is {checkpointer.directory / str(good)}"
                    raise FloatingPointError(f"{name} is {values[name]} at step {step}: the run stops; {where}.")
            values |= throughput.step()
            display.show(step, values)
            return values

        def save() -> None:
            metadata = {"config": dataclasses.asdict(config), "data": data_state}
            checkpointer.save(step, state.params, state.opt_state, metadata)

        # ------------------------------------------------------------ loop
        pending: tuple[int, dict[str, jax.Array]] | None = None
        last: dict[str, float] = {}
        stopping = False
        try:
            if start_step == 0:
                writer.write(0, evaluate(0))
            throughput.restart()
            watchdog.beat(f"the start at step {start_step}")
            for step in range(start_step + 1, config.num_steps + 1):
                if step == config.profile_start:
                    jax.profiler.start_trace(str(workdir / "profile"))
                # Metrics of a step are fetched after the next one was dispatched: the devices never wait for the host.
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                    data_state = next_state
                    if step < config.num_steps:
                        batch = put(next(iterator))
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
                    if stopping:
                        save()  # before the evaluation: little time is left
                    if is_eval:
                        last |= evaluate(step)
                    writer.write(step, last)
                    if is_save and not stopping:
                        save()
                    throughput.restart()
                    if stopping:
                        break
        finally:
            display.close()
            writer.close()
            checkpointer.wait()
            watchdog.pause()
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
            for _ in range(config.verify_resume_steps):
                again, _ = train_step(again, put(next(iterator)))
            check_resumed(verified_step, report.fingerprint(again.params), digest, display.say)
        checkpoint = checkpointer.directory / str(config.num_steps)
        show_results(config, checkpoint, state.params, baselines, tokenizer, display.say, command)
        display.say(f"step {config.num_steps}")
        display.say(f"parameters sha256 {digest}")
    iterator.close()
    return TrainResult(config.num_steps, digest, last, workdir)
