"""The processes of a run: how they connect, and their timeouts."""

from __future__ import annotations

import dataclasses

from bc2_jax.validation import check_fields, require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run. A Cloud TPU pod needs no settings: its processes find each other."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 listens."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, 0..num_processes - 1; the only field in which processes differ."""
    start_timeout: int = 300
    """Seconds within which all processes must connect."""
    heartbeat_timeout: int = 100
    """Seconds without a heartbeat after which a process counts as dead and the others stop."""
    step_timeout: int = 1800
    """Seconds without progress (a finished step, restored parameters, a compiled program) after which a process prints
    its stack and exits; 0: never."""

    def __post_init__(self) -> None:
        fields = ("coordinator_address", "num_processes", "process_id")
        missing = [field for field in fields if getattr(self, field) is None]
        require(
            len(missing) in (0, 3), f"distributed.{(*missing, '')[0]}", None,
            f"{', '.join(fields)} must be given all three or not at all",
        )  # fmt: skip
        check_fields(self, "distributed.", ("start_timeout", "heartbeat_timeout"), not_negative=("step_timeout",))
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
