"""The chat format as a Jinja template, for transformers, vLLM and llama.cpp.

Its text, with role pieces read as their ids, gives the ids of `bc2_jax.align.chat`: those of `encode_prompt` with
add_generation_prompt, else of `encode_conversation`. A template cannot tell a role piece from a user's text that spells
one; only code that encodes each text separately can.
"""

from __future__ import annotations

from pathlib import Path

from bc2_jax.convert.hf_config import read_json

CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""Where transformers looks first, for any tokenizer class."""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}
      {{- raise_exception('Only the first message may be a system text.') -}}
    {%- endif -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<reserved_106>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<reserved_107>' -}}
  {%- else -%}
    {{- raise_exception('Roles are system, user and assistant.') -}}
  {%- endif -%}
  {{- message['content'] -}}
  {%- if loop.last and message['role'] == 'assistant' and not add_generation_prompt -%}
    {{- '</s>' -}}
  {%- elif loop.last and message['role'] != 'assistant' and add_generation_prompt -%}
    {{- '<reserved_107>' -}}
  {%- endif -%}
{%- endfor -%}
"""


def read_chat_template(folder: Path) -> str | None:
    """The template of a PyTorch folder, from its own file or, in older releases, from tokenizer_config.json.

    Of several named templates it is "default". Raises ValueError for an unreadable file.
    """
    path = folder / CHAT_TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
