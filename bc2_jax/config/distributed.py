"""How the processes of a run find each other, and how long they wait for one that does not answer."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import require, require_positive, require_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run. On a Cloud TPU pod nothing of it need be given: they find each other."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 listens for the others."""
    num_processes: int | None = None
    """How many processes the run has."""
    process_id: int | None = None
    """Which of them this is, 0..num_processes - 1; the only field in which the processes of a run differ."""
    start_timeout: int = 300
    """Seconds until all processes must have come."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process is taken for dead and the others end."""
    step_timeout: int = 1800
    """Seconds without progress (a finished step, parameters restored, a compiled program) after which a process says
    where it hangs and ends; 0 for never."""

    def __post_init__(self) -> None:
        fields = ("coordinator_address", "num_processes", "process_id")
        missing = [field for field in fields if getattr(self, field) is None]
        require(
            len(missing) in (0, 3), f"distributed.{(*missing, '')[0]}", None,
            f"{', '.join(fields)} are given all three or not at all",
        )  # fmt: skip
        require_types(self, "distributed.")
        require_positive(self, "distributed.", "start_timeout", "heartbeat_timeout")
        require(self.step_timeout >= 0, "distributed.step_timeout", self.step_timeout, "it must be at least 0")
        if self.coordinator_address is None or self.num_processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator_address.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 65536,
            "distributed.coordinator_address", self.coordinator_address, "it must be HOST:PORT",
        )  # fmt: skip
        require_positive(self, "distributed.", "num_processes")
        require(
            0 <= self.process_id < self.num_processes,
            "distributed.process_id", self.process_id,
            f"it must be in 0..{self.num_processes - 1}, as distributed.num_processes = {self.num_processes}",
        )  # fmt: skip
