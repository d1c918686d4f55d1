"""tools/generate.py and the text it streams."""

from __future__ import annotations

import codecs
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert import pretrained
from bc2_jax.convert.pretrained import save_params
from bc2_jax.infer import prepared, text
from bc2_jax.infer.text import TextStream
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.tokenizer import Tokenizer, train_tokenizer
from tests.programs import load_program

tool = load_program("generate")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["the cat sat on the mat and the dog sat on the log 白日依山尽 "] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 490)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A random model whose vocabulary is larger than its tokenizer's."""
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
        vocab_size=600, model_max_length=128,
    )  # fmt: skip
    model = Baichuan2(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("model") / "a model"
    save_params(nnx.to_pure_dict(nnx.state(model)), config, folder, tokenizer.path)
    return folder


@pytest.fixture
def answers(monkeypatch) -> list[dict]:
    """What the tool asks of `generate_text`, which answers "!" instead of running the model."""
    asked: list[dict] = []

    def answer(model, tokenizer, prompts, **options) -> list[str]:
        asked.append({"prompts": prompts, **options})
        return ["!"] * len(prompts)

    monkeypatch.setattr(text, "generate_text", answer)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *args, **options: None)
    monkeypatch.setattr(prepared, "prepare", lambda model, **options: None)
    return asked


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


def test_terminal_streams_what_a_pipe_prints(checkpoint, capsys, monkeypatch):
    command = [str(checkpoint), "--prompt", "the cat ", "--max-new-tokens", "24", "--temperature", "1", "--top-k", "0"]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the cat ") and len(printed) > 10
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert tool.main(command) == 0
    assert capsys.readouterr().out == printed


def test_several_prompts(checkpoint, answers, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the dog\r\n\n the log\n", encoding="utf-8")
    command = [str(checkpoint), "--prompt", "the cat", "--prompts-file", str(file), "--max-new-tokens", "4"]
    assert tool.main(command) == 0
    assert capsys.readouterr().out == "the cat!\n\nthe dog!\n\n the log!\n\n"


def test_what_the_model_is_asked(checkpoint, answers):
    command = [
        str(checkpoint),
        "--prompt",
        "a\\nb",
        "--stop",
        "\\n",
        "--stop",
        "end",
        "--max-new-tokens",
        "4",
        "--seed",
        "7",
    ]
    assert tool.main(command) == 0
    assert tool.main([*command, "--escapes", "--greedy"]) == 0
    shared = {"max_new_tokens": 4, "top_k": 5, "top_p": 0.85, "seed": 7, "eos_token_id": [2], "on_text": None}
    exact = {"prompts": ["a\\nb"], "stop": ["\\n", "end"], "temperature": 0.3, "repetition_penalty": 1.05, **shared}
    read = {"prompts": ["a\nb"], "stop": ["\n", "end"], "temperature": 0.0, "repetition_penalty": 1.0, **shared}
    assert answers == [exact, read]


def test_an_adapter_is_loaded_with_the_model(checkpoint, answers, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "load_pretrained", lambda path, **options: asked.append(options))
    command = [str(checkpoint), "--prompt", "the cat", "--dtype", "float32", "--max-new-tokens", "4"]
    assert tool.main(command) == tool.main([*command, "--adapter", "run/adapter"]) == 0
    shared = {"dtype": "float32", "mesh": None}
    assert asked == [shared, {**shared, "adapter": Path("run/adapter")}]


def test_the_examples_of_the_help_work(checkpoint, answers, tmp_path, monkeypatch):
    """As a shell reads them."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("the cat\n", encoding="utf-8")
    examples = [line for line in tool.__doc__.splitlines() if line.startswith("bc2 generate")]
    assert [example for example in examples if "--chat" in example] == examples[3:]
    for example in examples[:3]:
        _, _, *arguments = shlex.split(example.replace("CHECKPOINT", shlex.quote(str(checkpoint))))
        assert tool.main([*arguments, "--max-new-tokens", "4"]) == 0
    assert [asked["prompts"] for asked in answers] == [["登鹳雀楼->"], ["登鹳雀楼->王之涣\n夜雨寄北->"], ["the cat"]]
    assert answers[1]["stop"] == ["\n"]


@given(st.text("ab\\\n\t\r夜", max_size=12))
def test_every_text_can_be_written_with_escapes(wanted):
    written = wanted
    for escape, character in reversed(tool.ESCAPES.items()):  # the backslash first
        written = written.replace(character, escape)
    assert "\n" not in written and tool.unescape(written) == wanted


@pytest.mark.parametrize("written", [r"a\x", "a\\", "\\\n", r"\\\d"])
def test_other_escapes_are_refused(written):
    with pytest.raises(ValueError, match="not an escape: legal with --escapes are"):
        tool.unescape(written)


def test_a_hint_where_an_escape_may_be_meant(checkpoint, answers, capsys):
    command = [str(checkpoint), "--max-new-tokens", "4"]
    assert tool.main([*command, "--prompt", "a\nb"]) == 0 and capsys.readouterr().err == ""
    assert tool.main([*command, "--prompt", r"a\nb"]) == 0 and "--escapes" in capsys.readouterr().err


@given(
    st.lists(st.text("ab 夜雨寄", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=4),
    st.sampled_from([("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16", b""), ("utf-16-le", codecs.BOM_UTF16_LE)]),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_prompts_come_out_of_a_file_as_they_are(prompts, encoding, end):
    name, mark = encoding
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.txt")
        file.write_bytes(mark + end.join(prompts).encode(name))
        assert tool.read_prompts_file(file, name) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("白日依山尽，黄河入海流。".encode("gb18030"), "is not UTF-8: byte 0 is 0xb0 .*--encoding gb18030"),
        ("the cat 白日".encode("utf-16"), "is not UTF-8: byte 0 is 0xff .*--encoding utf-16"),
        (b"the cat \xff\xfe", "is not UTF-8: byte 8 is 0xff"),
    ],
)
def test_a_file_that_is_not_utf8_is_named(checkpoint, capsys, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert tool.main([str(checkpoint), "--prompts-file", str(file)]) == 1
    error = capsys.readouterr().err
    assert re.search(f"{re.escape(str(file))} {message}", error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", "cat", "--top-p", "2"], "top_p = 2.0"),
        (["--prompt", "cat", "--seed", "-1"], "seed = -1"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "cat", "--stop", ""], "--stop = ''"),
        (["--prompt", "cat", "--max-new-tokens", "1000"], "more than model_max_length = 128"),
        (["--prompts-file", "/nowhere/prompts"], "prompts"),
        (["--prompts-file", __file__, "--encoding", "utf-99"], "--encoding = 'utf-99'"),
        (["--prompt", "\udcc4\udce3"], "it is not UTF-8"),
        (["--prompt", "\ud800"], "lone surrogate"),
        (["--prompt", r"a\x", "--escapes"], "not an escape"),
    ],
)
def test_errors_are_one_line_before_the_model_is_read(checkpoint, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(pretrained, "load_pretrained", None)
    assert tool.main([str(checkpoint), "--max-new-tokens", "8", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
