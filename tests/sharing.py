"""Runs of a test process that train the same thing share one traced and compiled step.

A whole run of a tiny model spends half of its time on tracing its step and its evaluation: the compilation cache of
JAX spares it the compiler alone.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Hashable
from typing import Any

from bc2_jax.align import rl
from bc2_jax.align.actor_critic import Models, Programs, make_programs
from bc2_jax.config import RLConfig, RunConfig
from bc2_jax.train import job, loop, pretrain
from bc2_jax.train.loop import _Loop

# What says how long a run is, where it is and what it writes; every other field of a config is part of its key.
_NOT_COMPILED = (
    "name", "workdir", "resume", "init_from", "num_steps", "seed", "log_every", "eval_every", "eval_batches",
    "verify_resume_steps", "export_hf", "checkpoint", "sample", "ngram_baselines", "allow_other_tokenizer",
)  # fmt: skip
_PACKAGES = ("bc2_jax.train", "bc2_jax.model", "bc2_jax.kernels", "bc2_jax.align")


def share_steps() -> None:
    """From now on, a run takes the objective and the optimizer of an earlier run of the same config and mesh.

    JAX finds by them what it has traced, lowered and compiled. A test that puts something in the place of a function of
    the package shares with none that did not.
    """
    original: dict[str, dict[str, Any]] = {}
    shared: dict[Hashable, tuple[Any, Any]] = {}
    programs: dict[Hashable, Programs] = {}
    compile_alone = _Loop.compile

    def patches() -> frozenset[tuple[str, str, Any]]:
        found = []
        for name in [name for name in sys.modules if name.startswith(_PACKAGES)]:
            now = {n: value for n, value in vars(sys.modules[name]).items() if callable(value)}
            before = original.setdefault(name, now)
            found += [(name, n, value) for n, value in now.items() if before.get(n) is not value]
        return frozenset(found)

    def key_of(config: RunConfig) -> Hashable:
        fields = sorted({field.name for field in dataclasses.fields(config)} - {*_NOT_COMPILED})
        return type(config), tuple((name, getattr(config, name)) for name in fields), patches()

    def compile_shared(self: _Loop) -> None:
        loss = self.job.objective.loss
        code = getattr(loss, "__code__", loss)  # tests define kinds of runs with the config of another
        key = (key_of(self.config), self.mesh, code)
        objective, optimizer = shared.setdefault(key, (self.job.objective, self.job.optimizer))
        self.job = self.job._replace(objective=objective, optimizer=optimizer)
        compile_alone(self)

    def make_shared_programs(config: RLConfig, models: Models, options: dict | None = None) -> Programs:
        key = (key_of(config), str(options))
        return programs.setdefault(key, make_programs(config, models, options))

    _Loop.compile = compile_shared  # type: ignore[method-assign]
    rl.make_programs = make_shared_programs
    job.make_train_step = functools.cache(job.make_train_step)
    loop.make_eval_step = functools.cache(loop.make_eval_step)
    pretrain.make_optimizer = functools.cache(pretrain.make_optimizer)
    patches()
