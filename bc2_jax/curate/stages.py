"""What makes a run restartable: finished stages are kept, and the finished shards of the one that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bc2_jax import files
from bc2_jax.curate.engine import Engine, Task
from bc2_jax.curate.storage import Folder

T = TypeVar("T")
_DONE, _BEGUN, _RESULTS = "done.json", "begun.json", "results"


def fingerprint(*values: Any) -> str:
    """Of values that JSON can hold: what a stage's result depends on."""
    return files.fingerprint(values)[:32]


class Stages:
    """The stages of one run, each in a folder of its own below `folder`.

    A stage's key says what its result depends on: its settings, and the key of the stage before. A stage with the same
    key as last time is not run again. A marker (done.json, begun.json, a task's result) is written after what it stands
    for and removed before it: what has a marker is there, whenever the run is killed.
    """

    def __init__(self, folder: Folder, engine: Engine, key: str, show: Callable[[str, int, int], None]) -> None:
        self._folder, self._engine, self._key, self._show = folder, engine, key, show
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def folder(self, stage: str) -> Folder:
        return self._folder / stage

    def run(
        self,
        stage: str,
        settings: Any,
        work: Callable[[Folder], T],
        *,
        clear: Callable[[], None] = lambda: None,
        intact: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """The result of `work(folder)`, JSON, or that of the run that had the same key, if it is still `intact`.

        `clear` removes what the stage writes outside of its folder: it is called after the markers of an earlier run
        with another key have gone.
        """
        folder = self.folder(stage)
        self._key = key = fingerprint(stage, settings, self._key)
        done = self._read(folder, _DONE)
        if done.get("key") == key and intact(done["result"]):
            self.reused.append(stage)
            self.seconds[stage] = done["seconds"]
            return done["result"]
        folder.delete(_DONE)
        if self._read(folder, _BEGUN).get("key") != key:
            folder.delete(_BEGUN)
            (folder / _RESULTS).remove()
            folder.remove()
            clear()
        folder.write_json(_BEGUN, {"key": key})
        begin = time.perf_counter()
        self._show(stage, 0, 0)
        result = work(folder)
        self.seconds[stage] = round(time.perf_counter() - begin, 3)
        folder.write_json(_DONE, {"key": key, "seconds": self.seconds[stage], "result": result})
        return result

    def map(
        self,
        stage: str,
        function: Callable[[Task], Task],
        tasks: Sequence[Task],
        intact: Callable[[str, Task], bool] = lambda *_: True,
    ) -> list[Task]:
        """The results of `function` for all tasks, in their order; each task has a `name` of its own.

        What a task returns is written when it has ended; a task whose result is there is not run again, if
        `intact(name, result)` finds that what it wrote is there too.
        """
        results = self.folder(stage) / _RESULTS
        there = set(results.names(".json"))

        def is_done(name: str) -> bool:
            result = self._read(results, f"{name}.json") if f"{name}.json" in there else {}
            if result and intact(name, result):
                return True
            results.delete(f"{name}.json")
            return False

        missing = [task for task in tasks if not is_done(task["name"])]

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

    @staticmethod
    def _read(folder: Folder, name: str) -> dict[str, Any]:
        """A marker, or nothing if it is not there or was cut by a machine that lost its power."""
        try:
            return folder.read_json(name) if folder.exists(name) else {}
        except ValueError:
            return {}
