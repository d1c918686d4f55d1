"""Requests longer than a model was trained for, through the scheduler: their positions, prefixes, options."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.infer import engine
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import split_model
from bc2_jax.serve.followers import pack, unpack
from bc2_jax.serve.loading import ServeOptions, describe_model, make_fingerprint
from bc2_jax.serve.requests import Ended, Handle, Request, Started, Tokens
from bc2_jax.serve.scheduler import Scheduler
from bc2_jax.serve.stats import Stats
from bc2_jax.serve.turns import Runner, Shapes, empty_turn
from tests.serve.fake_engine import FakeEngine

SLOTS = 256
SETTINGS = Settings(max_new_tokens=20, temperature=0.9, top_k=40, seed=3, eos_token_id=())


@pytest.fixture(scope="module")
def prepared(golden) -> Prepared:
    graphdef = split_model(golden.config, ComputeConfig(dtype="float32", scan_layers=True))[0]
    return engine.prepare(nnx.merge(graphdef, golden.params)).reach("ntk", SLOTS)


@pytest.fixture(scope="module")
def scheduler(prepared) -> Scheduler:
    shapes = Shapes(rows=4, slots=SLOTS, chunk=engine.chunk_length(), trained=prepared.config.model_max_length)
    runner = Runner(prepared, shapes)
    runner.warm_up()
    return Scheduler(runner, Stats())


def ids(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(3, 320, length).tolist())


def serve(scheduler: Scheduler, *requests: Request) -> list[tuple[int, list[int]]]:
    """How much of the prompt of each was copied, and its tokens."""
    handles = [Handle(request, 1000, lambda handle: None) for request in requests]
    for handle in handles:
        scheduler.admit(handle)
    while not scheduler.is_idle:
        scheduler.turn()
    found = []
    for handle in handles:
        events = list(handle)
        assert isinstance(events[0], Started) and events[-1] == Ended("length")
        tokens = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
        found.append((events[0].cached_tokens, tokens))
    return found


def test_a_long_request_gets_the_tokens_of_generation(prepared, scheduler):
    """Beside a short one, which is not stretched, and one of the same prompt that may become longer."""
    short = Request(ids(40), SETTINGS)
    long = Request(ids(200), SETTINGS)
    longer = Request(ids(200), dataclasses.replace(SETTINGS, max_new_tokens=56))
    expected = [continue_prompts(prepared, [r.ids], r.settings)[0].tokens for r in (short, long, longer)]
    # The two long prompts are the same, but their keys are not.
    assert serve(scheduler, short, long, longer) == [(0, tokens) for tokens in expected]
    # Those of the same length share their chunks.
    assert serve(scheduler, long, longer) == [(192, expected[1]), (192, expected[2])]


def test_prefixes_are_shared_by_the_same_stretch_alone():
    engine_ = FakeEngine()
    runner = Runner(None, Shapes(rows=4, slots=64, chunk=8, trained=32), engine_)
    runner.warm_up()
    scheduler = Scheduler(runner, Stats())

    def cached(new: int, length: int = 20) -> int:
        request = Request(tuple(range(length)), dataclasses.replace(SETTINGS, max_new_tokens=new))
        [(found, _)] = serve(scheduler, request)
        return found

    # Up to the trained length the stretch is 1, then the prompt's and the new tokens' sum decides.
    assert [cached(6), cached(12), cached(13), cached(14), cached(13), cached(14, 19)] == [0, 16, 0, 0, 16, 16]
    assert set(engine_.stretch_BS.ravel().tolist()) == {0.0, 1.0, 33 / 32, 34 / 32}


def test_a_turn_is_sent_with_its_stretches():
    shapes = Shapes(rows=4, slots=64, chunk=8, parts=2, trained=32)
    turn = empty_turn(shapes)
    turn.chunk.stretch_R[:] = 1.25, 1.0
    np.testing.assert_array_equal(unpack(pack(turn), shapes).chunk.stretch_R, np.float32([1.25, 1.0]))
    assert empty_turn(dataclasses.replace(shapes, trained=None)).chunk.stretch_R is None


def test_options_are_checked_before_weights_are_read(golden, tokenizer, tmp_path):
    """In a folder that has none."""
    config = json.loads((golden.folder / "config.json").read_bytes()) | {"vocab_size": tokenizer.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    plain = ServeOptions(tmp_path)

    def describe(**options):
        return describe_model(dataclasses.replace(plain, **options))

    trained = golden.config.model_max_length
    assert describe().length == trained
    assert describe(long_context="ntk", max_length=200).length == 200
    assert describe(long_context="ntk", max_length=200, slot_length=150).length == 150
    for options, message in (
        (dict(max_length=200), "--long-context and --max-length go together"),
        (dict(long_context="ntk"), "--long-context and --max-length go together"),
        (dict(long_context="ntk", max_length=trained), f"greater than model_max_length = {trained}"),
        (dict(slot_length=200), f"--slot-length = 200 is not valid: it must be in 2..{trained}, the model's own"),
        (dict(long_context="ntk", max_length=200, slot_length=201), "it must be in 2..200, --max-length"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(**options)
    # What may change a token changes the fingerprint.
    changed = [
        dict(quantize="int8"),
        dict(long_context="ntk", max_length=200),
        dict(long_context="ntk", max_length=300),
    ]
    names = {make_fingerprint(dataclasses.replace(plain, **more), tokenizer, 64) for more in [{}, *changed]}
    assert len(names) == 4
