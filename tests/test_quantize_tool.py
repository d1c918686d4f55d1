"""tools/quantize.py, and the tools that take what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, DataConfig, ModelConfig, SourceConfig
from bc2_jax.convert.pretrained import find_model, load_pretrained, save_params
from bc2_jax.evaluate.evaluation import load_scorer
from bc2_jax.evaluate.identity import Model, checksum_of
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.model.layout import scheme_of
from tests.packed_rows import pack_texts
from tests.programs import load_program

tool = load_program("quantize")
generate = load_program("generate")


@pytest.fixture(scope="module")
def model(small_tokenizer, tmp_path_factory) -> Path:
    config = ModelConfig(
        hidden_size=256, intermediate_size=272, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
        vocab_size=small_tokenizer.vocab_size, model_max_length=64,
    )  # fmt: skip
    model = Baichuan2(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("model") / "model"
    save_params(nnx.to_pure_dict(nnx.state(model)), config, folder, small_tokenizer.path)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text("the cat sat on the mat and the dog sat on the log " * 8, encoding="utf-8")
    return file


def test_held_out_rows_are_of_all_sources(model, monkeypatch):
    """A run's validation rows are source by source: of 10 batches of 64 tokens, four spread over them."""
    data = DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=8)
    found = dataclasses.replace(find_model(model), metadata={"config": {"data": dataclasses.asdict(data)}})
    monkeypatch.setattr("bc2_jax.data.loader.make_validation_batches", lambda data, rows: list(range(10)))
    assert tool.held_out_rows(found, 4 * tool.ROWS * 8) == [0, 2, 5, 7]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_from_a_model_to_text(model, text, tmp_path, capsys, scheme):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    given = [str(model), str(out), f"--{scheme}", "--text", str(text), "--json", str(figures)]
    assert tool.main(given) == 0
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["scheme"] == scheme and found["tokens"] > 50
    assert re.search(rf"perplexity\W+[\d.]+\W+{math.exp(found['changed_nats']):.4f}", printed)
    assert f"on {found['tokens']} tokens: {text}" in printed
    assert found["bytes"] < found["bytes_bfloat16"] * (0.6 if scheme == "int8" else 0.47)
    assert 0 < found["kl"] < (1e-3 if scheme == "int8" else 0.1)

    assert tool.main(given) == 1
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert tool.main([*given, "--overwrite"]) == 0
    capsys.readouterr()
    assert generate.main([str(out), "--prompt", "the cat", "--max-new-tokens", "4", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("the cat")

    # Evaluation scores with it, and knows it by its bits.
    scorer = load_scorer(Model(out, dtype="float32"), None)
    assert scheme_of(scorer.model) == scheme
    log_prob = scorer.rolling(["the cat sat on the mat"])[0]
    exact = load_scorer(Model(model, dtype="float32"), None).rolling(["the cat sat on the mat"])[0]
    assert log_prob == pytest.approx(exact, rel=0.02) and log_prob != exact
    assert checksum_of(scorer.model) != checksum_of(load_pretrained(model))

    assert tool.main([str(out), str(tmp_path / "again"), "--int8"]) == 1
    assert "is a quantized model" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_the_held_out_rows_of_a_run(model, small_tokenizer, tmp_path):
    """A run's checkpoint says where its data is; the rows that it did not train on are taken, as many as asked for."""
    texts = [f"the cat sat on the log and the dog sat {'on the mat ' * (i % 7)}" for i in range(400)]
    pack_texts(texts, small_tokenizer, tmp_path / "rows", 32, validation_fraction=0.2)
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "rows")),), tokenizer=str(small_tokenizer.path), sequence_length=32
    )
    metadata = {"config": {"data": json.loads(json.dumps(dataclasses.asdict(data)))}}
    found = dataclasses.replace(find_model(model), metadata=metadata)
    every, few = tool.held_out_rows(found, 10**6), tool.held_out_rows(found, 600)
    assert len(every) > len(few) == 2
    assert few[0]["input_ids"].shape == few[0]["labels"].shape == (8, 32)
    metadata["config"]["data"]["tokenizer"] = "gone"
    assert tool.held_out_rows(found, 600) == []
    assert tool.held_out_rows(find_model(model), 600) == []


def test_text_that_comes_with_python_where_there_is_no_other(model, tmp_path, capsys):
    assert tool.main([str(model), str(tmp_path / "out"), "--int8", "--tokens", "200"]) == 0
    assert "on 200 tokens: English documentation and code that come with Python" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int8", "--tokens", "0"], "error: --tokens = 0 is not valid"),
        (["--int8", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_done_is_said(model, tmp_path, capsys, options, message):
    assert tool.main([str(model), str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
