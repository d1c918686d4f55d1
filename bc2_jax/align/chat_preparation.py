"""Files of conversations -> packed rows of them, for supervised fine-tuning.

    OUT/questions.jsonl       the held-out conversations, {"messages": [...]}, the last message the expected answer

beside the files of `row_preparation`, whose manifest has the kind "chat". Rows of `row_length` inputs hold samples of
up to `max_length` tokens; of a preference pair the chosen answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from bc2_jax.align.chat import Message
from bc2_jax.align.chat_rows import EncodedSamples, encode_samples
from bc2_jax.align.formats import Sample
from bc2_jax.align.preparation_settings import Content, Settings
from bc2_jax.align.row_preparation import prepare
from bc2_jax.tokenizer import Tokenizer

QUESTIONS = "questions.jsonl"


def _encode(tokenizer: Tokenizer, settings: Settings, conversations: Sequence[Sequence[Message]]) -> EncodedSamples:
    return encode_samples(tokenizer, conversations, settings.max_length, settings.truncation)


def _describe(sample: Sample) -> dict[str, Any]:
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in sample.messages]}


CHAT = Content(
    kind="chat",
    accept=lambda found: found,
    text=lambda sample: sample.messages,
    encode=_encode,
    held_out=QUESTIONS,
    describe=_describe,
)
prepare_chat = functools.partial(prepare, CHAT)
"""`prepare` of conversations."""
