"""What makes a run restartable: finished stages are kept, and the finished shards of the one that was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bc2_jax.curate.engine import Engine, Task
from bc2_jax.curate.storage import Folder

T = TypeVar("T")
_DONE, _BEGUN = "done.json", "begun.json"


def fingerprint(*values: Any) -> str:
    """Of values that JSON can hold: what a stage's result depends on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Stages:
    """The stages of one run, each in a folder of its own below `folder`.

    A stage's key says what its result depends on: its settings, and the key of the stage before. A stage with the same
    key as last time is not run again.
    """

    def __init__(self, folder: Folder, engine: Engine, key: str, show: Callable[[str, int, int], None]) -> None:
        self._folder, self._engine, self._key, self._show = folder, engine, key, show
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def folder(self, stage: str) -> Folder:
        return self._folder / stage

    def is_done(self, stage: str, settings: Any) -> bool:
        """Whether the next stage was done by a run with the same key."""
        folder = self.folder(stage)
        return folder.exists(_DONE) and folder.read_json(_DONE)["key"] == fingerprint(stage, settings, self._key)

    def run(self, stage: str, settings: Any, work: Callable[[Folder], T]) -> T:
        """The result of `work(folder)`, JSON, or that of the run that had the same key."""
        folder, reuse = self.folder(stage), self.is_done(stage, settings)
        self._key = key = fingerprint(stage, settings, self._key)
        if reuse:
            done = folder.read_json(_DONE)
            self.reused.append(stage)
            self.seconds[stage] = done["seconds"]
            return done["result"]
        if not (folder.exists(_BEGUN) and folder.read_json(_BEGUN)["key"] == key):
            folder.remove()
        folder.write_json(_BEGUN, {"key": key})
        begin = time.perf_counter()
        self._show(stage, 0, 0)
        result = work(folder)
        self.seconds[stage] = round(time.perf_counter() - begin, 3)
        folder.write_json(_DONE, {"key": key, "seconds": self.seconds[stage], "result": result})
        return result

    def map(self, stage: str, function: Callable[[Task], Task], tasks: Sequence[Task]) -> list[Task]:
        """The results of `function` for all tasks, in their order; each task has a `name` of its own.

        What a task returns is written when it has ended; a task whose result is there is not run again.
        """
        results = self.folder(stage) / "results"
        there = set(results.names(".json"))
        missing = [task for task in tasks if f"{task['name']}.json" not in there]

        def work(task: Task) -> Task:
            result = function(task)
            results.write_json(f"{task['name']}.json", result)
            return {}

        done = len(tasks) - len(missing)
        self._show(stage, done, len(tasks))
        for _ in self._engine.map(work, missing):
            done += 1
            self._show(stage, done, len(tasks))
        return [results.read_json(f"{task['name']}.json") for task in tasks]
