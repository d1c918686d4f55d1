"""Conversations with a tiny model, and in the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from flax import nnx

from bc2_jax.align import conversation
from bc2_jax.align.chat import encode_prompt
from bc2_jax.align.conversation import Conversation, chat
from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert import pretrained
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.infer import engine
from bc2_jax.infer.generate import generate
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.text import ContinuedText, find_chat_settings
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.model.layout import scheme_of
from tests.programs import load_program

tool = load_program("generate")

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
    vocab_size=512, model_max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Prepared:
    return engine.prepare(Baichuan2(CONFIG, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def folder(small_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "chat"
    params = nnx.to_pure_dict(nnx.state(Baichuan2(CONFIG, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))))
    save_folder(params, CONFIG, path, "float32", tokenizer_path=small_tokenizer.path)
    (path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 9, "max_new_tokens": 2048}')
    return path


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[int], dict]]:
    """Prompts and settings; the answers are 1, 2, 3 ... instead of a model's."""
    found: list[tuple[list[int], dict]] = []

    def answer(model, tokenizer, prompts, *, on_text=None, **settings) -> list[ContinuedText]:
        found.append((prompts[0], settings))
        if on_text is not None:
            on_text(0, str(len(found)))
        return [ContinuedText(str(len(found)), "eos")]

    monkeypatch.setattr(conversation, "continue_text", answer)
    return found


def test_an_answer_is_what_the_model_says_after_the_prompt(model, small_tokenizer):
    messages = [{"role": "system", "content": "the mat"}, {"role": "user", "content": "the cat"}]
    drawn = dict(max_new_tokens=20, temperature=1.0, top_k=0, seed=3)
    pieces: list[str] = []
    text = chat(model, small_tokenizer, messages, on_text=pieces.append, **drawn)
    ids = encode_prompt(small_tokenizer, messages, 20, 64)
    [tokens] = generate(model, [ids], eos_token_id=[2, 195, 196], vocab_size=490, **drawn)
    assert text == small_tokenizer.decode(tokens) == "".join(pieces)
    # A conversation is the same, turn by turn.
    talk = Conversation(model, small_tokenizer, "the mat", **drawn)
    assert talk.ask("the cat").text == text
    assert talk.messages == [*messages, {"role": "assistant", "content": text}]


def test_an_answer_ends_at_a_role(model, small_tokenizer):
    """By giving the role token that the model would write the meaning of an end."""
    messages = [{"role": "user", "content": "the cat"}]
    drawn = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=30)
    ids = encode_prompt(small_tokenizer, messages, 30, 64)
    for seed in range(40):
        [tokens] = generate(model, [ids], eos_token_id=[], vocab_size=490, seed=seed, **drawn)
        if any(token in (195, 196) for token in tokens):
            break
    before = tokens[: min(tokens.index(t) for t in (195, 196, 2) if t in tokens)]
    assert chat(model, small_tokenizer, messages, seed=seed, **drawn) == small_tokenizer.decode(before)


def test_history_is_cut_as_the_prompt_says_and_kept(asked, model, small_tokenizer):
    talk = Conversation(model, small_tokenizer, "the mat", max_new_tokens=32)
    found = [talk.ask("the cat sat on the log") for _ in range(4)]
    assert [prompt for prompt, _ in asked] == [
        encode_prompt(small_tokenizer, talk.messages[: 2 * n], 32, 64) for n in (1, 2, 3, 4)
    ]
    assert len(talk.messages) == 9 and found[0].dropped_rounds == 0 < found[3].dropped_rounds
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "the mat"}]


def test_an_interrupted_answer_is_kept(model, small_tokenizer):
    talk = Conversation(model, small_tokenizer, temperature=1.0, top_k=0, max_new_tokens=30, eos_token_id=[])
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    found = talk.ask("the cat", interrupt)
    assert (found.text, found.reason) == ("".join(said), "interrupted")
    assert talk.messages[1:] == [{"role": "assistant", "content": found.text}]
    before, settings = list(talk.messages), talk.settings
    with pytest.raises(ValueError, match="top_p = 2.0 is not valid"):
        talk.change({**settings, "top_p": 2.0, "stop": ["end"]})
    assert talk.settings == settings
    with pytest.raises(ValueError, match="a lone surrogate in the user message"):
        talk.ask("\ud800")
    assert talk.messages == before


def run(monkeypatch, lines: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return tool.main([*map(str, arguments)])


def test_a_conversation_from_a_pipe(asked, folder, small_tokenizer, capsys, monkeypatch, tmp_path):
    system = tmp_path / "system.txt"
    system.write_text("the log\n")
    lines = "the cat\n\n/nothing\nthe dog\r\n/clear\n /etc/mat\n/exit\nmore\n"
    assert run(monkeypatch, lines, folder, "--chat", "--system-file", system, "--top-k", 3, "--stop", "end") == 0
    out, err = capsys.readouterr()
    assert out == "1\n2\n3\n"
    assert err.splitlines() == [
        "[/nothing is not a command: legal are /system, /reset, /regenerate, /save, /settings, /help, /exit; a message "
        "may begin with a space]",
        "[the conversation begins again]",
    ]
    first = [{"role": "system", "content": "the log"}, {"role": "user", "content": "the cat"}]
    second = [*first, {"role": "assistant", "content": "1"}, {"role": "user", "content": "the dog"}]
    third = [first[0], {"role": "user", "content": " /etc/mat"}]
    assert [prompt for prompt, _ in asked] == [
        encode_prompt(small_tokenizer, messages, 32, 64) for messages in (first, second, third)
    ]
    shared = {"repetition_penalty": 1.05, "top_p": 0.85, "seed": 0, "eos_token_id": [2, 195, 196], "stop": ["end"]}
    assert asked[0][1] == {"temperature": 0.7, "top_k": 3, "max_new_tokens": 32, **shared}


def test_a_long_context_has_room_for_more_history(asked, folder, small_tokenizer, capsys, monkeypatch):
    """Of a model in int8 with a cache in int8."""
    fake, models = conversation.continue_text, []

    def answer(model, *arguments, **options):
        models.append(model)
        return fake(model, *arguments, **options)

    monkeypatch.setattr(conversation, "continue_text", answer)
    options = ["--long-context", "ntk", "--max-length", "200", "--quantize", "int8", "--kv", "int8"]
    assert run(monkeypatch, "the cat sat on the log\n" * 4, folder, "--chat", *options) == 0
    said = [{"role": "user", "content": "the cat sat on the log"}]
    for answer in "123":
        said += [{"role": "assistant", "content": answer}, said[0]]
    ids = encode_prompt(small_tokenizer, said, 32, 200)
    assert asked[-1][0] == ids and len(ids) > 64 - 32 and "no room" not in capsys.readouterr().err
    assert (models[0].max_length, models[0].kv, scheme_of(models[0].merge())) == (200, "int8", "int8")


def test_the_terminal_asks_and_says_what_was_cut(asked, folder, capsys, monkeypatch):
    lines = iter(["the cat sat on the log", KeyboardInterrupt, *["the dog sat on the mat"] * 3, EOFError])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    stdin = io.StringIO()
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert tool.main([str(folder), "--chat", "--max-new-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line] == ["1", "2", "3", "4"]
    assert "[the oldest round has no room: the model did not see that]" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--prompt", "hi"], "--chat reads messages from standard input"),
        (["--chat", "--system", "a", "--system-file", "b"], "--system and --system-file are two system texts"),
        (["--system", "a", "--prompt", "hi"], "--system and --system-file belong to --chat"),
        (["--chat", "--top-p", "2"], "top_p = 2.0"),
        (["--chat", "--max-length", "128"], "--long-context and --max-length go together: give both or neither."),
        (["--chat", "--long-context", "ntk", "--max-length", "64"], "greater than model_max_length = 64"),
        (["--chat", "--long-context", "yarn", "--max-length", "128"], "it must be \"ntk\": the model has ALiBi"),
        (["--chat", "--system-file", "/nowhere/system"], "No such file"),
    ],
)  # fmt: skip
def test_errors_are_one_line_before_the_model_is_read(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(pretrained, "load_pretrained", None)
    assert run(monkeypatch, "hi\n", folder, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_settings_of_a_release(folder, tmp_path):
    assert find_chat_settings(folder) == {"temperature": 0.7, "top_k": 9, "max_new_tokens": 2048}
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5, "top_p": null}')
    assert find_chat_settings(folder) == {"temperature": 0.0}
