"""Turns on several processes of one slice: process 0 decides, and all dispatch the same programs in the same order.

A turn is sent one turn before it runs, so its message precedes the current turn's programs in every device's queue: a
follower knows the next turn while the devices still compute, and they never wait for it. Nothing polls: without
requests the followers wait inside the message of the next turn, which process 0 sends at least once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bc2_jax.serve.turns import Kind, Results, Runner, Shapes, Turn, empty_turn

_AXES = ("process", "device")


def pack(turn: Turn) -> np.ndarray:
    """int32 [W]; W is the same for every turn of the same shapes."""
    content = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(turn))
    return np.frombuffer(content + bytes(-len(content) % 4), np.int32)


def unpack(words: np.ndarray, shapes: Shapes) -> Turn:
    """Inverse of `pack`."""
    content, at, found = words.tobytes(), 0, []
    leaves, structure = jax.tree.flatten(empty_turn(shapes))
    for leaf in leaves:
        x = np.frombuffer(content, leaf.dtype, leaf.size, at).reshape(leaf.shape)
        found.append(x)
        at += x.nbytes
    return jax.tree.unflatten(structure, found)


class DeviceChannel:
    """Sends words from process 0 to all, as a sum over all devices to which only process 0 contributes."""

    def __init__(self) -> None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        self._mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), _AXES)
        whole = NamedSharding(self._mesh, PartitionSpec())
        self._sum = jax.jit(lambda x: x.sum(axis=0, dtype=x.dtype), out_shardings=whole)

    def send(self, words: np.ndarray) -> Callable[[], np.ndarray]:
        """On process 0; calling the result waits until all processes have the words."""
        mine = multihost_utils.host_local_array_to_global_array(words[None], self._mesh, PartitionSpec(_AXES[0]))
        message = self._sum(mine)
        return lambda: np.asarray(jax.device_get(message.addressable_data(0)))

    def expect(self, count: int) -> Callable[[], np.ndarray]:
        """On the other processes: joins the next message, of `count` words; calling the result waits for it."""
        return self.send(np.zeros(count, np.int32))


class Leader:
    """Runs turns on process 0 and sends them to the others."""

    def __init__(self, runner: Runner, channel: DeviceChannel):
        self._runner, self._channel = runner, channel
        self.shapes = runner.shapes
        self._next: Turn | None = None

    def warm_up(self) -> dict[str, float]:
        """`Runner.warm_up` on all processes at the same time, and a first message without work."""
        seconds = self._runner.warm_up()
        start = time.monotonic()
        self._channel.send(pack(empty_turn(self.shapes, Kind.IDLE)))
        return seconds | {"message": round(time.monotonic() - start, 3)}

    def run(self, turn: Turn) -> Results | None:
        """Sends this turn and dispatches the previous one; returns the latter's results, None at the first call.

        A STOP turn waits until it has arrived, so that this process may end.
        """
        wait = self._channel.send(pack(turn))
        now, self._next = self._next, turn
        results = None if now is None else self._runner.run(now)
        if turn.kind == Kind.STOP:
            wait()
        return results


def follow(runner: Runner, channel: DeviceChannel) -> None:
    """Main loop of every process except 0, until a STOP turn."""
    runner.warm_up()
    size = len(pack(empty_turn(runner.shapes)))
    turn = unpack(channel.expect(size)(), runner.shapes)
    while turn.kind != Kind.STOP:
        receive = channel.expect(size)
        runner.run(turn)
        turn = unpack(receive(), runner.shapes)
