"""tools/generate.py and the text it streams."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert import pretrained
from bc2_jax.infer.stream import TextStream
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer, train_tokenizer

spec = importlib.util.spec_from_file_location("generate_tool", Path(__file__).parents[2] / "tools" / "generate.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["the cat sat on the mat and the dog sat on the log 白日依山尽 "] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 490)


@pytest.fixture
def loaded(monkeypatch, tokenizer) -> None:
    """A random model where the tool looks for one."""
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
        vocab_size=490, model_max_length=128,
    )  # fmt: skip

    def load(path, dtype, mesh) -> Baichuan2:
        return Baichuan2(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))

    monkeypatch.setattr(pretrained, "find_tokenizer", lambda path: tokenizer.path)
    monkeypatch.setattr(pretrained, "load_pretrained", load)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    return [pieces[f"<0x{byte:02X}>"] for byte in text.encode()]


def test_stream_waits_for_whole_characters(tokenizer):
    stream = TextStream(tokenizer.decode)
    ids = [*tokenizer.encode("the "), *byte_ids(tokenizer, "鹳\N{GRINNING FACE}"), *tokenizer.encode(" mat")]
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "the 鹳\N{GRINNING FACE} mat"
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_stream_shows_broken_bytes_when_it_is_certain(tokenizer):
    stream = TextStream(tokenizer.decode)
    ids = [*byte_ids(tokenizer, "鹳")[:2], *tokenizer.encode("cat"), *byte_ids(tokenizer, "鹳")[:1]]
    pieces = [stream.add(i) for i in ids]
    assert pieces[:2] == ["", ""] and pieces[-1] == ""
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_terminal_streams_what_a_pipe_prints(loaded, capsys, monkeypatch):
    command = ["here", "--prompt", "the cat ", "--max-new-tokens", "24", "--temperature", "1", "--top-k", "0"]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the cat ") and len(printed) > 10
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert tool.main(command) == 0
    assert capsys.readouterr().out == printed


def test_several_prompts(loaded, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the dog\r\n\n the log\n", encoding="utf-8")
    command = ["here", "--prompt", "the cat", "--prompts-file", str(file), "--greedy", "--max-new-tokens", "4"]
    assert tool.main(command) == 0
    out = capsys.readouterr().out
    assert [out.count(prompt) >= 1 for prompt in ("the cat", "the dog", " the log")] == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", "cat", "--top-p", "2"], "top_p = 2.0"),
        (["--prompt", ""], "is empty"),
        (["--prompts-file", "/nowhere/prompts"], "prompts"),
    ],
)
def test_errors_are_one_line(loaded, capsys, arguments, message):
    assert tool.main(["here", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
