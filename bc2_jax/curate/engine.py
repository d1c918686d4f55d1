"""Where curation runs: Daft, in this process or on a Ray cluster, with the same code.

Work that looks at one shard at a time is a task: a function that reads files, writes files and returns a few counts.
Work that compares documents is a dataframe of hashes and numbers. Text never moves between machines.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bc2_jax.validation import require

if TYPE_CHECKING:
    import daft


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
