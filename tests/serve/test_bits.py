"""A request's tokens and log-probabilities are the same bits whatever else is served, and those of `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.infer import engine
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import param_shardings, split_model
from bc2_jax.serve.requests import Ended, Handle, PromptScored, Request, Started, Tokens
from bc2_jax.serve.scheduler import Scheduler
from bc2_jax.serve.stats import Stats
from bc2_jax.serve.turns import Runner, Shapes, places_for
from bc2_jax.sharding import from_host, to_host, use_mesh_of

COMPILED = "/jax/core/compile/backend_compile_duration"
MESHES = {"one device": {}, "4 devices": {"rope": (1, 1, 4), "alibi": (2, 1, 2)}}
"""(data, fsdp, tensor). Of (1, 1, 4) each device has a single head, for which a turn reads two prompts on a CPU."""


def ids(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(int(x) for x in np.random.default_rng([length, salt]).integers(3, 320, length))


EVERYTHING = Settings(
    max_new_tokens=14, temperature=1.1, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=2**32 - 5, eos_token_id=(),
    presence_penalty=0.4, frequency_penalty=-0.3, logit_bias={7: 3.0, 9: -50.0}, min_tokens=3, vocab_size=300,
)  # fmt: skip
GREEDY = Settings(max_new_tokens=9, temperature=0.0, repetition_penalty=1.0, eos_token_id=(5, 6))
TARGETS = (Request(ids(150), EVERYTHING, place=1, top_log_probs=3), Request(ids(64), GREEDY, top_log_probs=1))


class Served:
    """A model of the golden data behind a scheduler; all tests use the same rows."""

    def __init__(self, prepared: engine.Prepared, parts: int, places: int):
        self.prepared = prepared
        self.shapes = Shapes(rows=8, slots=256, chunk=engine.chunk_length(), parts=parts, places=places, steps=3)
        self.stats = Stats()
        runner = Runner(prepared, self.shapes)
        runner.warm_up()
        self.scheduler = Scheduler(runner, self.stats)
        self.compiled: list[str] = []

    def admit(self, request: Request, owner: str) -> Handle:
        handle = Handle(dataclasses.replace(request, owner=owner), 1000, lambda handle: None)
        self.scheduler.admit(handle)
        return handle

    def run(self) -> None:
        while not self.scheduler.is_idle:
            self.scheduler.turn()


@pytest.fixture(scope="module", params=MESHES)
def served(request, golden, mesh_of) -> Iterator[Served]:
    """RoPE in fp32, on a mesh with an int8 cache; ALiBi in bfloat16."""
    scheme = golden.config.position_embedding
    shape, is_rope = MESHES[request.param].get(scheme), scheme == "rope"
    dtype, kv = "float32" if is_rope else "bfloat16", "int8" if is_rope and shape else "compute"
    config = dataclasses.replace(golden.config, model_max_length=512)
    graphdef = split_model(config, ComputeConfig(dtype=dtype, scan_layers=True))[0]
    # Parameters that are bound to their device, as those that were restored are, and others.
    shardings, parts, places = jax.devices()[0] if is_rope else None, 1, 1
    if shape is not None:
        shardings, parts = param_shardings(config, mesh_of(*shape)), shape[0] * shape[1]
        places = places_for(config.num_attention_heads // shape[2])
    model = nnx.merge(graphdef, jax.device_put(golden.params, shardings))
    served = Served(engine.prepare(model, kv=kv), parts, places)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            served.compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield served
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def alone(served) -> list[list]:
    """The scored tokens of each target, alone."""
    found = []
    for i, target in enumerate(TARGETS):
        handle = served.admit(target, f"alone {i}")
        served.run()
        found.append(tokens(handle))
        assert len(found[-1]) > 5
    return found


def tokens(handle: Handle, cached: int | None = None) -> list:
    events = list(handle)
    assert isinstance(events[0], Started) and events[-1] in (Ended("length"), Ended("eos"))
    assert cached is None or events[0].cached_tokens == cached
    return [token for event in events if isinstance(event, Tokens) for token in event.tokens]


def others(count: int) -> list[Request]:
    """Requests of all kinds of settings and lengths."""
    kinds = [
        Settings(max_new_tokens=20, temperature=1.0, top_k=0, top_p=0.8, eos_token_id=()),
        Settings(max_new_tokens=3, temperature=0.0, eos_token_id=()),
        Settings(max_new_tokens=30, temperature=0.7, top_k=100, top_p=1.0, eos_token_id=(), frequency_penalty=1.0),
        Settings(max_new_tokens=11, temperature=2.0, top_k=3, eos_token_id=(), logit_bias={3: 5.0}),
    ]
    return [
        Request(ids(1 + 37 * i % 200, i), dataclasses.replace(kinds[i % 4], seed=i), top_log_probs=[None, 5][i % 2])
        for i in range(count)
    ]


def test_nothing_is_compiled_after_the_start(served):
    handles = [served.admit(request, "compiled") for request in others(8)]
    served.scheduler.turn()
    served.scheduler.end(handles[0], Ended("cancelled"))
    served.admit(dataclasses.replace(TARGETS[0], prompt_log_probs=1), "compiled")
    served.run()
    served.admit(TARGETS[0], "compiled")
    served.admit(TARGETS[0], "compiled")
    served.run()
    assert served.compiled == []


def test_tokens_are_those_of_generate(served, alone):
    count = len(TARGETS) if served.shapes.parts == 1 else 1  # which compiles two programs each
    for target, found in zip(TARGETS[:count], alone, strict=False):
        prompts = [[3, 4]] * target.place + [list(target.ids)]
        expected = continue_prompts(served.prepared, prompts, target.settings, log_probs=True)[-1]
        assert [score.id for score in found] == expected.tokens
        np.testing.assert_array_equal(np.float32([score.log_prob for score in found]), np.float32(expected.log_probs))


def test_tokens_do_not_depend_on_what_else_is_served(served, alone):
    for i, target in enumerate(TARGETS):
        # With seven others, in each row of a part.
        for before in (0, 3, 7):
            owner = f"crowd {i} {before}"
            crowd = others(7)
            for other in crowd[:before]:
                served.admit(other, owner)
            handle = served.admit(target, owner)
            for other in crowd[before:]:
                served.admit(other, owner)
            served.run()
            assert tokens(handle, cached=0) == alone[i], before


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_tokens_do_not_depend_on_when_others_come_and_go(served, alone, gap):
    """Others come every few turns, some are cancelled in between; the target gets the row of one of these."""
    owner = f"staggered {gap}"
    coming = iter(others(12))
    early = [served.admit(next(coming), owner) for _ in range(8)]
    for _ in range(gap):
        served.scheduler.turn()
    for handle in early[::2]:
        served.scheduler.end(handle, Ended("cancelled"))
    handles = [served.admit(target, owner) for target in TARGETS]
    while not all(handle.is_complete for handle in handles):
        for _ in range(gap):
            served.scheduler.turn()
        if served.scheduler.free_rows > 1 and (other := next(coming, None)):
            served.admit(other, owner)
        if gap == 2 and not early[1].is_complete:
            served.scheduler.end(early[1], Ended("cancelled"))
    assert [tokens(handle) for handle in handles] == alone
    served.run()


def test_tokens_do_not_depend_on_cached_prefixes(served, alone):
    """From the row itself, from another row, and from one that is still reading the same prompt."""
    target = TARGETS[0]
    chunks = (len(target.ids) - 1) // served.shapes.chunk * served.shapes.chunk
    first = served.admit(target, "cached")
    served.run()
    again = served.admit(target, "cached")
    assert tokens(first, 0) == alone[0]
    served.run()
    assert tokens(again, chunks) == alone[0]
    long = dataclasses.replace(target, settings=dataclasses.replace(target.settings, max_new_tokens=60))
    busy = served.admit(long, "cached")
    served.scheduler.turn()
    copied = served.admit(target, "cached")
    served.run()
    assert tokens(copied, chunks) == alone[0] and tokens(busy)[: len(alone[0])] == alone[0]
    per_part = served.shapes.rows // served.shapes.parts
    together = [served.admit(target, "together") for _ in range(served.shapes.rows)]
    before = served.stats.cached_tokens
    served.run()
    assert [tokens(handle) for handle in together] == [alone[0]] * len(together)
    # Each part computes the first chunks once in each of its places.
    assert served.stats.cached_tokens - before == served.shapes.parts * (per_part - served.shapes.places) * chunks


def test_log_probs_of_the_prompt_are_those_of_the_model(served, alone):
    """And asking for them does not change the tokens."""
    target = dataclasses.replace(TARGETS[0], prompt_log_probs=2)
    handle = served.admit(target, "scored")
    served.admit(others(2)[1], "scored")
    served.run()
    events = list(handle)
    assert [token for event in events if isinstance(event, Tokens) for token in event.tokens] == alone[0]
    (scores,) = (event.scores for event in events if isinstance(event, PromptScored))
    assert scores[0] is None and [score.id for score in scores[1:]] == list(target.ids[1:])
    forward = jax.jit(lambda prepared, ids: jax.nn.log_softmax(prepared.merge()(ids)))
    with use_mesh_of(served.prepared.params["norm"]["weight"]):
        batch = from_host(np.array([target.ids] * served.shapes.parts, np.int32))
        expected = to_host(forward(served.prepared, batch))[0]
    exact = served.prepared.compute.dtype == "float32" and served.prepared.kv == "compute"
    found = np.array([score.log_prob for score in scores[1:]])
    np.testing.assert_allclose(found, expected[np.arange(149), list(target.ids[1:])], atol=2e-5 if exact else 0.1)
    for score in scores[1:]:
        # As lm-eval asks: the token's own value is in the list where it is among the most likely, bit for bit.
        assert len(score.top) == 2 and score.top[0][1] >= score.top[1][1]
        assert dict(score.top).get(score.id, score.log_prob) == score.log_prob
