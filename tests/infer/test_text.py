"""Text in, text out: stop texts wherever tokens have their borders, ids without a piece, eos ids of every source."""

from __future__ import annotations

import json

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert.conversion import to_orbax
from bc2_jax.infer import engine
from bc2_jax.infer.generate import generate
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.text import TextStream, find_eos_ids, generate_text
from bc2_jax.model.baichuan import Baichuan2
from tests.convert.models import random_folder

PROMPTS = ["the cat ", "白日", "on the log"]
DRAWN = dict(max_new_tokens=24, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=[])


@pytest.fixture(scope="module")
def model() -> Prepared:
    """With more ids than the tokenizer has pieces."""
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
        vocab_size=1024, model_max_length=128,
    )  # fmt: skip
    return engine.prepare(Baichuan2(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0)))


# ------------------------------------------------------------------------------------------------------------- streams


def cut_at_stop(text: str, stops: list[str]) -> str:
    """By trying every end: the first at which a stop text is complete, of several there the longest."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start]
    return text


@given(
    st.lists(st.text("ab鹳", max_size=3).map(str.encode), max_size=12),
    st.lists(st.text("ab鹳", min_size=1, max_size=4), max_size=3),
    st.randoms(),
)
def test_a_stream_ends_before_the_first_stop_text(parts, stops, random):
    """Tokens are any cuts of the bytes, also inside a character."""
    data = b"".join(parts)
    borders = sorted(random.randint(0, len(data)) for _ in range(len(data) // 2))
    tokens = [data[i:j] for i, j in zip([0, *borders], [*borders, len(data)], strict=True)]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), stops)
    given_text, expected = "", cut_at_stop(data.decode(), stops)
    for i in range(len(tokens)):
        given_text += stream.add(i)
        assert expected.startswith(given_text)  # nothing has to be taken back
        if stream.stopped:
            break
    assert given_text + stream.finish() == expected
    assert stream.stopped == (expected != data.decode())
    assert stream.add(0) == "" if stream.stopped else True


def test_what_can_begin_no_stop_text_is_given_at_once():
    words = ["one", " two", "\n", "three", "\n\nfour"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), ["\n\n"])
    assert [stream.add(i) for i in range(5)] == ["one", " two", "", "\nthree", ""]
    assert stream.stopped and stream.finish() == ""


# ---------------------------------------------------------------------------------------------------------- generation


def test_text_of_a_padded_vocabulary_is_whole(model, small_tokenizer):
    tokens = generate(model, small_tokenizer.encode_batch(PROMPTS), **DRAWN)
    assert any(token >= 490 for row in tokens for token in row)  # so the model draws them, and keeps the text of others
    assert all(small_tokenizer.decode(row) for row in tokens)
    texts = generate_text(model, small_tokenizer, PROMPTS, **DRAWN)
    known = generate(model, small_tokenizer.encode_batch(PROMPTS), vocab_size=490, **DRAWN)
    assert all(token < 490 for row in known for token in row)
    assert texts == [small_tokenizer.decode(row) for row in known]


def test_stop_texts_and_streaming(model, small_tokenizer):
    whole = generate_text(model, small_tokenizer, PROMPTS, **DRAWN)
    stops = [whole[0][4:7], whole[1][-2:], "\x00 never"]
    expected = [cut_at_stop(text, stops) for text in whole]
    assert expected[0] != whole[0] and len(set(map(len, expected))) > 1
    assert generate_text(model, small_tokenizer, PROMPTS, stop=stops, **DRAWN) == expected
    streamed = [""] * 3

    def on_text(place: int, text: str) -> None:
        assert text
        streamed[place] += text

    assert generate_text(model, small_tokenizer, PROMPTS, stop=stops, on_text=on_text, **DRAWN) == expected
    assert streamed == expected
    assert generate_text(model, small_tokenizer, PROMPTS, stop=stops[0], **DRAWN)[0] == expected[0]


def test_generation_ends_with_the_last_stop_text(model, small_tokenizer, monkeypatch):
    (whole,) = generate_text(model, small_tokenizer, PROMPTS[:1], **DRAWN)
    steps, decode = [], engine.decode
    monkeypatch.setattr(engine, "decode", lambda *a, **k: steps.append(1) or decode(*a, **k))
    generate_text(model, small_tokenizer, PROMPTS[:1], stop=[whole[2:4]], **DRAWN)
    assert len(steps) < 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts="abc"), "prompts = 'abc' is not valid: it must be a list of texts"),
        (dict(prompts=[[1]]), r"prompts\[0\] = \[1\] is not valid: it must be a text"),
        (dict(prompts=["a"], stop=[""]), "a stop text must not be empty"),
        (dict(prompts=["a"], stop=[5]), r"stop\[0\] = 5 is not valid"),
        (dict(prompts=["a"], stop=5), "stop = 5 is not valid"),
        (dict(prompts=["a", ""], max_new_tokens=4), r"prompts\[1\] is empty"),
        (dict(prompts=["a"], seed=-1), "seed = -1"),
    ],
)
def test_errors(model, small_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, small_tokenizer, **arguments)


# ------------------------------------------------------------------------------------------------------------- eos ids


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, [2]),
        (2, {}, [2]),
        (2, {"eos_token_id": None}, [2]),
        (2, {"eos_token_id": [196, 2, 195]}, [2, 196, 195]),
        (2, {"eos_token_id": 196}, [2, 196]),
        ([2, 196], None, [2, 196]),
        ([2, 196], {"eos_token_id": 2}, [2, 196]),
    ],
)
def test_every_place_that_names_eos_ids_counts(tmp_path, config, generation, expected):
    folder = random_folder(tmp_path / "hf")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert find_eos_ids(folder) == expected
    to_orbax(folder, tmp_path / "checkpoint")
    assert find_eos_ids(tmp_path / "checkpoint") == expected


@pytest.mark.parametrize("value", ["2", [2, "196"], [2.0], True, {"ids": 2}])
def test_what_is_no_eos_id_is_said(tmp_path, value):
    folder = random_folder(tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id = .* it must be an id or a list of ids"
    ):
        find_eos_ids(folder)
