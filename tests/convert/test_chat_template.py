"""The template, rendered by Jinja itself, against our encoding; and where it is written and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bc2_jax.align.chat import encode_conversation, encode_prompt
from bc2_jax.convert.chat_template import CHAT_TEMPLATE, read_chat_template
from bc2_jax.convert.conversion import to_hf, to_orbax
from bc2_jax.convert.folder import foreign_in_export
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.source import open_source
from tests.convert.models import TINY, random_params


def render(messages: list[dict[str, str]], **values: Any) -> str:
    """As `transformers` does."""

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, **values)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: "<" not in text)
TEXTS |= st.sampled_from([" two spaces ", "\n\n", "{{ x }}", "{%- endfor -%}", "class A:\n    pass\n", "  \t", "你好"])


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS | st.none())
def test_rendered_text_has_the_ids_of_our_encoding(tokenizer, texts, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    rendered = render(messages, add_generation_prompt=True)
    assert tokenizer.encode(rendered, parse_special=True) == encode_prompt(tokenizer, messages, 0, 10_000)
    if len(texts) % 2 == 0:
        assert tokenizer.encode(render(messages), parse_special=True) == encode_conversation(tokenizer, messages)[0]


def test_what_has_no_role_is_refused():
    with pytest.raises(ValueError, match="Roles are system, user and assistant"):
        render([{"role": "tool", "content": "4"}])
    with pytest.raises(ValueError, match="Only the first message may be a system text"):
        render([{"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}])


@pytest.mark.parametrize("layout", ["baichuan2", "baichuan1", "llama"])
def test_exports_have_it_and_a_source_keeps_its_own(tmp_path, tokenizer, layout):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    save_folder(random_params(config, np.float32), config, tmp_path / "a", tokenizer_path=tokenizer.path)
    assert read_chat_template(tmp_path / "a") == CHAT_TEMPLATE
    assert open_source(tmp_path / "a").unread == ()
    own = "{{ messages[0].content }}\r\n"
    (tmp_path / "a" / "chat_template.jinja").write_text(own, newline="")
    (tmp_path / "a" / "SHA256SUMS").unlink()
    to_orbax(tmp_path / "a", tmp_path / "b")
    to_hf(tmp_path / "b", tmp_path / "c", layout=layout)
    assert (tmp_path / "c" / "chat_template.jinja").read_bytes() == own.encode()
    assert "chat_template.jinja" in (tmp_path / "c" / "SHA256SUMS").read_text()
    if layout == "llama":
        assert json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["chat_template"] == own
    assert foreign_in_export(tmp_path / "c") == []  # it is ours to replace


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("x", "x"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], None),
        (None, None),
    ],
)  # fmt: skip
def test_older_folders_have_it_in_tokenizer_config(tmp_path: Path, said, expected):
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    assert read_chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        read_chat_template(tmp_path)
