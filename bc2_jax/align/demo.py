"""Conversations for the demo: dialogues in Chinese and English, and tasks with checkable answers.

Dialogues come from the PyPI package chatterbot-corpus 1.3.3 (BSD licence), fetched once with pip and checked against a
pinned SHA-256. Tasks use the demo's text and arithmetic, which a model of a few million parameters learns in minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bc2_jax.align.preparation_settings import RowSettings
from bc2_jax.align.row_preparation import QUESTIONS, prepare_chat
from bc2_jax.convert.pretrained import find_tokenizer
from bc2_jax.data.demo_corpus import demo_documents
from bc2_jax.data.pinned_package import (
    Unreachable,
    check_sha256,
    default_cache,
    fetch_wheel,
    publishing,
    require_writable,
)

logger = logging.getLogger(__name__)

_PACKAGE = "chatterbot-corpus==1.3.3"
_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
_LANGUAGES = ("chinese", "english")
_LONGEST_DIALOGUE = 180
"""Characters: rows of the demo have 256 tokens."""

_FORMAT = 1
_TASKS = 8000
_HELD_OUT = {"dialogues": 0.05, "tasks": 0.03}

Conversation = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class DemoRows:
    """Files made by `prepare_chat_demo`."""

    tokenizer: Path
    sources: tuple[Path, ...]
    """Folders of packed rows: dialogues, if available, and tasks."""
    questions: Path
    """The held-out tasks."""


def prepare_chat_demo(base: Path, sequence_length: int, cache: str | os.PathLike[str] | None = None) -> DemoRows:
    """Packs dialogues and tasks with the tokenizer of the model `base`, in seconds, into a folder of `cache` named
    after a hash of settings, conversations and tokenizer; an existing folder is reused."""
    cache = Path(cache) if cache is not None else default_cache()
    tokenizer = find_tokenizer(base)
    conversations = {"dialogues": read_dialogues(cache), "tasks": make_tasks(demo_documents(cache), _TASKS)}
    conversations = {name: found for name, found in conversations.items() if found}
    settings = {
        name: RowSettings(max_length=sequence_length, validation_fraction=_HELD_OUT[name]) for name in conversations
    }
    about = [conversations, {name: dataclasses.asdict(one) for name, one in settings.items()}, _FORMAT]
    key = hashlib.sha256(json.dumps(about).encode() + tokenizer.read_bytes()).hexdigest()[:16]
    folder = cache / f"demo-chat-{key}"
    rows = DemoRows(tokenizer, tuple(folder / name for name in conversations), folder / "tasks" / QUESTIONS)
    if folder.is_dir():
        logger.info("chat demo: found in %s", folder)
        return rows
    with publishing(folder) as temporary:
        for name, found in conversations.items():
            text = temporary / f"{name}.jsonl"
            lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in found)
            text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            made = prepare_chat([text], tokenizer, temporary / name, settings[name])
            logger.info("chat demo: %s %s with %s tokens", f"{made.samples:,}", name, f"{made.tokens:,}")
    return rows


def read_dialogues(cache: str | os.PathLike[str] | None = None) -> list[Conversation]:
    """Dialogues of a user and an assistant; none, with a warning, if the package can't be fetched."""
    cache = Path(cache) if cache is not None else default_cache()
    wheel = cache / "chatterbot_corpus.whl"
    if not wheel.is_file():
        require_writable(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            try:
                fetch_wheel(_PACKAGE, _SHA256, Path(folder)).replace(wheel)
            except Unreachable as error:
                logger.warning("chat demo: no dialogues, because pip can't fetch %s: %s", _PACKAGE, error)
                return []
    check_sha256(str(wheel), wheel.read_bytes(), _SHA256)
    found: dict[str, Conversation] = {}
    with zipfile.ZipFile(wheel) as package:
        for name in sorted(package.namelist()):
            if name.endswith(".yml") and name.split("/")[-2] in _LANGUAGES:
                for turns in _read_conversations(package.read(name)):
                    conversation = _as_messages(turns)
                    if conversation:
                        found.setdefault(json.dumps(conversation), conversation)  # there are many duplicates
    return list(found.values())


def _read_conversations(content: bytes) -> list[list[str]]:
    import yaml

    conversations = yaml.safe_load(content)["conversations"]
    return [[str(turn).strip() for turn in turns] for turns in conversations]


def _as_messages(turns: Sequence[str]) -> Conversation:
    """The first turns, as long as they are short and not empty; maybe none."""
    kept: Conversation = []
    length = 0
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        length += len(question) + len(answer)
        if not question or not answer or length > _LONGEST_DIALOGUE:
            break
        kept += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return kept


# --------------------------------------------------------------------------------------------------------------- tasks


def make_tasks(documents: dict[str, list[str]], count: int, seed: int = 0) -> list[Conversation]:
    """`count` different questions with answers, in Chinese and English, from `demo_corpus.demo_documents`;
    deterministic."""
    rng = random.Random(seed)
    makers = [_add, _compare, _halve, _follow, *_makers_of_text(documents)]
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = rng.choice(makers)(rng)
        found.setdefault(question, answer)
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in found.items()
    ]


_WORDS = {"zh": ("曹操", "玄德", "孔明", "关公", "吕布"), "en": ("the", "of", "is")}
"""Words to look for in a text, by its language."""
Maker = Callable[[random.Random], tuple[str, str]]


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(1, 30), rng.randrange(1, 10)
    return rng.choice([f"What is {a} + {b}?", f"{a} 加 {b} 等于几？"]), str(a + b)


def _compare(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1, 40), 2)
    return rng.choice([f"Which is larger, {a} or {b}?", f"{a} 和 {b} 哪个大？"]), str(max(a, b))


def _halve(rng: random.Random) -> tuple[str, str]:
    a = rng.randrange(10_000)
    if rng.random() < 0.5:
        return f"Is {a} even or odd?", "odd" if a % 2 else "even"
    return f"{a} 是单数还是双数？", "单数" if a % 2 else "双数"


def _follow(rng: random.Random) -> tuple[str, str]:
    a = rng.randrange(300)
    return rng.choice([f"Which number follows {a}?", f"{a} 后面是几？"]), str(a + 1)


def _makers_of_text(documents: dict[str, list[str]]) -> list[Maker]:
    """Tasks on pieces of the demo's text: its language, and whether it contains a word or a name."""
    pieces = {language: list(_cut(documents[language], language)) for language in documents}
    languages = [language for language in ("zh", "en", "code") if pieces.get(language)]
    names = {"zh": ("Chinese", "中文"), "en": ("English", "英文"), "code": ("Python", "Python")}
    found = {
        word: [piece for piece in pieces[language] if word in piece.split() or (language == "zh" and word in piece)]
        for language in languages if language in _WORDS for word in _WORDS[language]
    }  # fmt: skip

    def tell_language(rng: random.Random) -> tuple[str, str]:
        of = rng.choice(languages)
        piece = rng.choice(pieces[of])
        english, chinese = names[of]
        return rng.choice([(f"Which language is this?\n{piece}", english), (f"这是什么语言？\n{piece}", chinese)])

    def find_word(rng: random.Random) -> tuple[str, str]:
        language = rng.choice([language for language in languages if language in _WORDS])
        word = rng.choice(_WORDS[language])
        # Balanced, so that a guess is right half the time.
        piece = rng.choice(found[word] if found[word] and rng.random() < 0.5 else pieces[language])
        is_there = piece in found[word]
        if language == "zh":
            return f"下文提到{word}吗？{piece}", "提到了" if is_there else "没有"
        return f'Is the word "{word}" in this? {piece}', "yes" if is_there else "no"

    return [tell_language, find_word]


def _cut(documents: Sequence[str], language: str) -> Iterator[str]:
    """Short pieces: clauses of Chinese, a few words of English, lines of code."""
    for document in documents:
        if language == "zh":
            yield from (c for c in re.split(r"[，。！？：；、“”\s]+", document) if 4 <= len(c) <= 14 and c.isalpha())
        elif language == "en":
            for line in document.splitlines():
                words = re.findall(r"[A-Za-z]+", line)
                if len(words) >= 6 and line[0].isalpha():
                    yield " ".join(words[:5])
        else:
            yield from (line.strip() for line in document.splitlines() if 12 <= len(line.strip()) <= 40)
