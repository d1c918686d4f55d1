"""Several processes do the same turns in the same order; here as threads around fake engines."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.followers import Leader, follow, pack, unpack
from bc2_jax.serve.requests import Request, Tokens
from bc2_jax.serve.service import Service
from bc2_jax.serve.turns import Kind, Runner, Shapes, empty_turn
from tests.faults.harness import free_port
from tests.serve import sliced
from tests.serve.fake_engine import FakeEngine, continued

SHAPES = Shapes(rows=4, slots=64, chunk=8, parts=2)


class Wire:
    """A channel to one follower."""

    def __init__(self):
        self.words: queue.Queue[np.ndarray] = queue.Queue()

    def send(self, words):
        self.words.put(words)
        return self.words.join

    def expect(self, count):
        def receive():
            words = self.words.get(timeout=60)
            self.words.task_done()
            assert len(words) == count
            return words

        return receive


def requests() -> list[Request]:
    return [
        Request(
            tuple(range(i, i + 5 * i + 1)),
            Settings(max_new_tokens=4 + i, eos_token_id=(), seed=i, logit_bias={3: 1.5}),
            top_log_probs=i % 3,
            prompt_log_probs=1 if i == 3 else None,
        )
        for i in range(7)
    ]


def test_a_turn_survives_the_wire():
    turn = empty_turn(SHAPES, Kind.RUN, requests()[:2])
    turn.chunk.ids_RC[:] = np.arange(16).reshape(2, 8)
    turn.chunk.is_last_R[1] = True
    turn.cancel_B[2] = False
    turn = turn._replace(steps=np.int32(7), labels_RC=turn.labels_RC * -3)
    words = pack(turn)
    assert words.dtype == np.int32 and words.shape == pack(empty_turn(SHAPES, Kind.STOP)).shape
    found = unpack(words, SHAPES)
    assert jax.tree.structure(found) == jax.tree.structure(turn)
    for one, other in zip(jax.tree.leaves(turn), jax.tree.leaves(found), strict=True):
        assert np.asarray(one).dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stop", [False, True])
def test_a_follower_dispatches_what_the_leader_does(stop):
    wire, engines = Wire(), [FakeEngine(parts=2), FakeEngine(parts=2)]
    follower = threading.Thread(target=follow, args=(Runner(None, SHAPES, engines[1]), wire), daemon=True)
    follower.start()
    service = Service(Leader(Runner(None, SHAPES, engines[0]), wire))
    service.start()
    handles = service.submit_all(requests())
    if stop:
        next(iter(handles[0]))
        service.stop(60)
    else:
        for handle in handles:
            found = [t for event in handle if isinstance(event, Tokens) for t in event.tokens]
            expected = continued(handle.request.ids, handle.request.settings)[0]
            top = handle.request.top_log_probs
            assert found == [score._replace(top=score.top[:top]) for score in expected]
        service.drain(60)
    follower.join(60)
    assert not follower.is_alive()
    programs = [[line for line in engine.log if "read" not in line] for engine in engines]
    assert programs[0] == programs[1] and len(programs[0]) > (5 if stop else 20)
    assert [line for line in engines[1].log if "read" in line] == [], "a follower reads no results"


def test_a_turn_is_sent_before_the_one_before_it_runs():
    """So the next message stands in the queue of the devices ahead of the programs of this turn."""
    order = []

    class Noting(FakeEngine):
        def decode(self, prepared, state, steps, cancel_B):
            order.append("decode")
            return super().decode(prepared, state, steps, cancel_B)

    class Sends:
        def send(self, words):
            order.append("send")
            return lambda: order.append("arrived")

    leader = Leader(Runner(None, SHAPES, Noting(parts=2)), Sends())  # type: ignore[arg-type]  # nobody listens
    leader.warm_up()
    order.clear()
    turn = empty_turn(SHAPES)._replace(steps=np.int32(1))
    assert leader.run(turn) is None
    assert leader.run(turn) is not None
    leader.run(empty_turn(SHAPES, Kind.STOP))
    assert order == ["send", "send", "decode", "send", "decode", "arrived"]


def test_two_processes_serve_one_model(mesh_of):
    """Their tokens are those of one process with as many devices."""
    port = free_port()
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(index), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    said = dict(line.split(" ", 1) for line in outputs[0].splitlines() if " " in line)
    assert "followed" in outputs[1] and said["state"] == "stopped", outputs
    assert said["compiled"].startswith("0 cached") and not said["compiled"].endswith(" 0"), outputs
    assert float(said["idle"]) < 1
    runner = Runner(sliced.prepared_on(mesh_of(2, 1, 2), root / "tests" / "golden" / "rope-tiny"), sliced.SHAPES)
    service = Service(runner)
    service.start()
    handles = service.submit_all(sliced.requests())
    expected = [[t for event in handle if isinstance(event, Tokens) for t in event.tokens] for handle in handles]
    service.stop()
    assert json.loads(said["tokens"]) == expected
