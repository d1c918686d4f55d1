"""Where and how curation runs: on Daft, in this process or on a Ray cluster, resumable at the shard where it stopped.

Work that looks at one shard at a time is a task: a function that reads files, writes files and returns a few counts.
Work that compares documents is a dataframe of hashes and numbers. Text never moves between machines.
"""

from __future__ import annotations

import abc
import atexit
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.storage import Folder
from bc2_jax.files import fingerprint
from bc2_jax.validation import require

if TYPE_CHECKING:
    import daft

Result = dict[str, Any]
"""What a task returns: JSON."""
_DONE, _BEGUN, _RESULTS = "done.json", "begun.json", "results"


class Engine:
    """`runner` is "native", "ray" (a cluster on this machine) or ray://HOST:PORT (an existing one).

    A process keeps one runner, because Daft can't change it. Raises ValueError for an unknown or a second runner, and
    ImportError, naming the extra to install, without Daft or Ray.
    """

    _in_use: str | None = None

    def __init__(self, runner: str = "native") -> None:
        legal = runner in ("native", "ray") or runner.startswith("ray://")
        require(legal, "--runner", runner, "legal values are native, ray and ray://HOST:PORT")
        os.environ.setdefault("DO_NOT_TRACK", "true")  # or Daft and Ray report their use
        os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
        try:
            import daft

            used = Engine._in_use
            require(used in (None, runner), "--runner", runner, f"this process has the runner {used}")
            if used:
                pass
            elif runner == "native":
                daft.set_runner_native()
            else:
                import ray

                if not ray.is_initialized():
                    ray.init(None if runner == "ray" else runner, log_to_driver=False, logging_level=logging.ERROR)
                daft.set_runner_ray(noop_if_initialized=True)
        except ImportError as error:
            extra = "data" if runner == "native" else "data-ray"
            raise ImportError(f"{error.name} is missing: pip install 'bc2_jax[{extra}]'.") from error
        self.runner = Engine._in_use = runner
        daft.set_execution_config(parquet_target_row_group_size=4 << 20)
        if self.is_distributed:
            # With Daft's default of 200, a connected component of a thousand nodes takes a minute.
            daft.set_execution_config(shuffle_aggregation_default_partitions=2 * self.partitions())
        # An engine thread that still runs when the interpreter exits can crash it, after everything is written.
        atexit.register(time.sleep, 0.2)

    @property
    def is_distributed(self) -> bool:
        return self.runner != "native"

    def partitions(self) -> int:
        """Number of partitions of a shuffle."""
        if not self.is_distributed:
            return 1
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Runs `function` on every task in parallel; yields (index, result) as tasks end. Both are JSON.

        On a cluster the function and its closure are pickled. Raises what the function raises, and RuntimeError if the
        engine ends before all tasks have.
        """
        import daft

        @daft.func.batch(return_dtype=daft.DataType.string(), batch_size=1)
        def run(texts: daft.Series) -> list[str]:
            return [json.dumps(function(json.loads(text))) for text in texts.to_pylist()]

        if not tasks:
            return
        frame = daft.from_pydict({"index": list(range(len(tasks))), "task": [json.dumps(task) for task in tasks]})
        if self.is_distributed:
            frame = frame.into_partitions(len(tasks))
        results = frame.select(frame["index"], run(frame["task"]).alias("result"))
        ended = 0
        for row in results.iter_rows():
            ended += 1
            yield row["index"], json.loads(row["result"])
        if ended < len(tasks):
            raise RuntimeError(f"{len(tasks) - ended} of {len(tasks)} tasks were given up by the engine.")


@dataclasses.dataclass(frozen=True)
class Run:
    """What every task of a run needs; pickled to the machine where the task runs."""

    work: Folder
    """Has one folder for each stage."""
    out: Folder
    """Folder of the result."""
    config: CurationConfig


class Stage(abc.ABC):
    """A step of the pipeline. It reads folders of earlier stages and writes to `run.work / name`."""

    name: str

    @abc.abstractmethod
    def settings(self, config: CurationConfig) -> Any:
        """What the result depends on besides the stage before: JSON."""

    @abc.abstractmethod
    def run(self, runner: Runner) -> Any:
        """Does the work and returns the result as JSON."""

    def clear(self, run: Run) -> None:  # noqa: B027  # most stages write nothing there
        """Removes what an earlier run with other settings wrote outside the stage's folder."""

    def is_intact(self, runner: Runner, result: Any) -> bool:
        """Whether what the stage wrote outside its folder is still complete."""
        return True


class Runner:
    """Runs stages, and resumes where an earlier run stopped.

    A stage's key is a hash of its settings and of the key of the stage before. A stage that finished with the same key
    is not run again. A marker (done.json, begun.json, the result of a task) is written after the files it stands for
    and deleted before them. So a marker's files are complete, whenever the run is killed.
    """

    def __init__(self, run: Run, engine: Engine, key: str, show: Callable[[str, int, int], None]) -> None:
        """`key` is a hash of the inputs; `show(stage, done, total)` is called as tasks finish."""
        self.run, self.engine = run, engine
        self.config = run.config
        self.results: dict[str, Any] = {}
        """Results of the finished stages by name."""
        self.seconds: dict[str, float] = {}
        self._key, self._show = key, show
        self._stage = ""

    @property
    def folder(self) -> Folder:
        """The folder of the current stage."""
        return self.run.work / self._stage

    @property
    def shards(self) -> list[str]:
        """Names of all shards, in the order of the raw files."""
        return [name for report in self.results["read"] for name in report["shards"]]

    def table(self, folder: str, columns: list[str]) -> daft.DataFrame:
        """Columns of all parquet files of a folder below `work`, as a dataframe."""
        import daft

        return daft.read_parquet((self.run.work / folder).pattern(".parquet")).select(*columns)

    def execute(self, stage: Stage) -> Any:
        """The result of a stage, from disk if it has finished with the same key and is intact."""
        self._stage = name = stage.name
        folder = self.folder
        self._key = key = fingerprint([name, stage.settings(self.config), self._key])[:32]
        done = _read_marker(folder, _DONE)
        if done.get("key") == key and stage.is_intact(self, done["result"]):
            self.seconds[name] = done["seconds"]
            self.results[name] = done["result"]
            return done["result"]
        folder.delete(_DONE)
        if _read_marker(folder, _BEGUN).get("key") != key:
            folder.delete(_BEGUN)
            (folder / _RESULTS).remove()
            folder.remove()
            stage.clear(self.run)
        folder.write_json(_BEGUN, {"key": key})
        begin = time.perf_counter()
        self._show(name, 0, 0)
        result = stage.run(self)
        self.seconds[name] = round(time.perf_counter() - begin, 3)
        folder.write_json(_DONE, {"key": key, "seconds": self.seconds[name], "result": result})
        self.results[name] = result
        return result

    def map(
        self,
        task: Callable[[Run, str], Result],
        names: Sequence[str],
        suffix: str = "",
        is_intact: Callable[[Run, str, Result], bool] = lambda *_: True,
    ) -> list[Result]:
        """`task(run, name)` for all names, in parallel on the engine; the results in the order of `names`.

        The result of a task is written as soon as the task ends, to results/NAME + `suffix`. A task that has a result
        is not run again if `is_intact(run, name, result)` finds its files complete.
        """
        run, results = self.run, self.folder / _RESULTS
        finished = set(results.names(".json"))

        def file(name: str) -> str:
            return f"{name}{suffix}.json"

        def is_done(name: str) -> bool:
            result = _read_marker(results, file(name)) if file(name) in finished else {}
            if result and is_intact(run, name, result):
                return True
            results.delete(file(name))
            return False

        def work(name: str) -> None:
            results.write_json(file(name), task(run, name))

        missing = [name for name in names if not is_done(name)]
        done = len(names) - len(missing)
        self._show(self._stage, done, len(names))
        for _ in self.engine.map(work, missing):
            done += 1
            self._show(self._stage, done, len(names))
        return [results.read_json(file(name)) for name in names]


def _read_marker(folder: Folder, name: str) -> Result:
    """A marker; {} if it does not exist or was cut off by a power loss."""
    try:
        return folder.read_json(name) if folder.exists(name) else {}
    except ValueError:
        return {}
