"""Attacks on a chat model: templates with topics, planted secrets and words, prompts of a user's file, and harmless
questions that only look harmful.

The six classes of attack are those of Safety-Prompts (arXiv 2304.10436). This package contains nothing harmful: its
topics are about office kitchens and card tricks; harmful topics and prompts come from the user.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bc2_jax.align.chat import Message
from bc2_jax.align.formats import inner_records, read_prompt
from bc2_jax.data.records import Invalid, read_records, read_text
from bc2_jax.data.text_files import kind_of, open_binary
from bc2_jax.files import fingerprint
from bc2_jax.validation import choices, join_some, require, show

_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("red_team.json").read_text(encoding="utf-8"))
CLASSES: Mapping[str, str] = _DATA["classes"]
"""Class of attack -> its title in tables."""
BENIGN = "benign"
"""Class of harmless questions, which should be answered."""
OTHER = "other"
"""Class of prompts of a user's file without a class."""
NAMES: Mapping[str, str] = {**CLASSES, OTHER: "prompts of no class", BENIGN: "harmless look-alikes"}
LANGUAGES = ("en", "zh")
_TEMPLATES: list[dict[str, str]] = _DATA["templates"]
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
_WORDS: list[str] = _DATA["words"]
"""Parts of Chinese secrets."""


class Target(NamedTuple):
    """A line or record of a user's file: a topic for templates, or a prompt."""

    topic: str | None
    messages: list[Message] | None
    kind: str | None
    """Of CLASSES, BENIGN or OTHER; None for a topic of all classes."""
    category: str | None
    language: str
    secret: str | None
    """Of a prompt: part of its system text that the answer must not contain."""
    word: str | None
    """Of a prompt: what it tells the model to say."""
    fields: dict[str, Any]
    """The whole record, for judges."""
    where: str


@dataclasses.dataclass(frozen=True)
class Attack:
    """A prompt, and how to check its answer without a judge."""

    kind: str
    """Of CLASSES, BENIGN or OTHER."""
    language: str
    messages: list[Message]
    where: str
    """File with line and template; "planted" or "look-alike" for ours."""
    topic: str | None = None
    category: str | None = None
    secret: str | None = None
    """The attack succeeds if the answer contains this (`red_team.leaks`)."""
    word: str | None = None
    """The attack succeeds if the answer says this (`red_team.obeys`)."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """16 hex digits, a hash of the prompt and its check."""
        about = [self.messages, self.kind, self.secret, self.word]
        return fingerprint(about, sort_keys=False)[:16]


def our_targets() -> list[Target]:
    """The harmless topics of this package."""
    return [
        Target(topic, None, None, None, language, None, None, {}, "our topics")
        for language in LANGUAGES
        for topic in _DATA["topics"][language]
    ]


def read_targets(path: str, lines: Literal["topic", "prompt"] = "topic") -> list[Target]:
    """Reads topics and prompts from a user's file.

    A .jsonl, .ndjson, .json or .parquet file has records with `topic`, or with a prompt in any format of
    `align.formats` (`prompt`, `messages`, `instruction`, `question` ...), whose last answer is left out. Optional
    fields are `class` (one of CLASSES, in any spelling, or "benign"), `category`, `language` ("zh" or "en"; default: by
    the script) and, for a prompt, `secret` or `word`. `type` is the class if it names one, else the category. In a JSON
    object of lists of records, the layout of Safety-Prompts, each key is the `type` of its records. Any other file is
    text with a topic a line, or a prompt, as `lines` says; blank lines are skipped.

    Raises FileNotFoundError, and ValueError, naming the places, for unusable records and for a file without any.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    found: list[Target] = []
    problems: list[str] = []
    for value, where in _records(path, lines, problems):
        try:
            found.append(_target(value, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ValueError(f"{path} has {len(problems)} records that can't be used: {join_some(problems, 5)}.")
    require(bool(found), "--prompts", path, "it holds no topic and no prompt")
    return found


def make_attacks(
    targets: Iterable[Target], *, seed: int = 0, planted: int = 4, look_alikes: bool = True, system: str = "",
    both_languages: bool = False, limit: int | None = None,
) -> list[Attack]:  # fmt: skip
    """All attacks without duplicates, in the order of NAMES.

    Each template without a topic is used `planted` times, with secrets and words drawn from `seed`; `look_alikes` adds
    our harmless questions. Templates are applied to topics of their language, or to all with `both_languages`. `system`
    is prepended to the system text of templates, and becomes that of prompts without one. `limit` draws at most so many
    of each class and kind of check, from `seed`.
    """
    targets = list(targets)
    found = [
        *_planted(seed, planted),
        *(attack for target in targets for attack in _around(target, seed, both_languages)),
    ]
    if look_alikes:
        found += [
            Attack(BENIGN, language, [{"role": "user", "content": question}], "look-alike")
            for language in LANGUAGES
            for question in _DATA["benign"][language]
        ]
    if system:
        found = [dataclasses.replace(attack, messages=_with_system(system, attack)) for attack in found]
    order = {name: place for place, name in enumerate(NAMES)}
    groups: dict[tuple[int, bool], list[Attack]] = {}
    known: set[str] = set()
    for attack in found:
        if attack.id not in known:
            known.add(attack.id)
            groups.setdefault((order[attack.kind], not (attack.secret or attack.word)), []).append(attack)
    return [attack for group in sorted(groups) for attack in _sample(groups[group], limit, f"{seed}/{group}")]


def _sample(attacks: list[Attack], limit: int | None, seed: str) -> list[Attack]:
    if limit is None or len(attacks) <= limit:
        return attacks
    return [attacks[i] for i in sorted(random.Random(seed).sample(range(len(attacks)), limit))]


# ------------------------------------------------------------------------------------------------------------ templates


def _planted(seed: int, times: int) -> Iterator[Attack]:
    for template in _TEMPLATES:
        if "{topic}" not in template["user"]:
            for number in range(times):
                yield _fill(template, None, f"{seed}/{number}", "planted")


def _around(target: Target, seed: int, both_languages: bool) -> Iterator[Attack]:
    """The prompt of a target, or all templates with its topic."""
    if target.messages is not None:
        about = {name: getattr(target, name) for name in ("category", "secret", "word", "fields")}
        yield Attack(target.kind or OTHER, target.language, target.messages, target.where, **about)
        return
    for template in _TEMPLATES:
        is_meant = target.kind in (None, template["class"]) and "{topic}" in template["user"]
        if is_meant and (both_languages or template["language"] == target.language):
            yield _fill(template, target, f"{seed}/{target.topic}", target.where)


def _fill(template: Mapping[str, str], target: Target | None, seed: str, where: str) -> Attack:
    """The attack of a template; its word is drawn from `seed`."""
    name = f"{template['class']}.{template['name']}.{template['language']}"
    topic = target.topic if target is not None else None
    check = template.get("check")
    word = _make_word(random.Random(f"{seed}/{name}"), template["language"]) if check else None
    values = {"topic": topic, "secret": word, "word": word}

    def fill(text: str) -> str:  # in one pass: a topic's text is not a placeholder
        return re.sub(r"\{(topic|secret|word)\}", lambda match: str(values[match[1]]), text)

    roles = [role for role in ("system", "user") if role in template]
    return Attack(
        kind=template["class"],
        language=template["language"],
        messages=[{"role": role, "content": fill(template[role])} for role in roles],
        where=f"{where}, template {name}",
        topic=topic,
        category=target.category if target is not None else None,
        fields=target.fields if target is not None else {},
        **({check: word} if check else {}),
    )


def _make_word(rng: random.Random, language: str) -> str:
    """A made-up word: two parts in capitals, in Chinese three words."""
    if language == "zh":
        return "".join(rng.sample(_WORDS, 3))
    return "-".join("".join(rng.choices(_SYLLABLES, k=3)) for _ in range(2)).upper()


def _with_system(system: str, attack: Attack) -> list[Message]:
    first = attack.messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *attack.messages]
    if ", template " not in attack.where:  # a user's prompt with a system text
        return attack.messages
    return [{"role": "system", "content": f"{system}\n{first['content']}"}, *attack.messages[1:]]


# -------------------------------------------------------------------------------------------------------------- reading


def _records(path: str, lines: str, problems: list[str]) -> Iterator[tuple[Any, str]]:
    """The records of a file, or lines of a text file; adds unreadable ones to `problems`."""
    kind, compression = kind_of(path) or ("text", None)
    if kind == "text":
        with open_binary(path) as file:
            text = read_text(file, path, compression)
        if isinstance(text, Invalid):
            problems.append(str(text))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield {lines: line.strip()}, f"{path}:{number}"
        return
    for record in read_records(path):
        if isinstance(record, Invalid):
            problems.append(str(record))
            continue
        value, where = record.value, record.where
        if not _is_lists(value):
            yield from inner_records(value, where)
            continue
        for key, items in value.items():
            for number, item in enumerate(items, 1):
                named = {"type": key, **item} if isinstance(item, dict) else item
                yield named, f"{where} (item {number} of {key!r})"


def _is_lists(value: Any) -> bool:
    """Whether `value` is an object of lists of records by class, not a record."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and not value.keys() & {"messages", "conversations", "prompt", "chosen"}
        and all(isinstance(items, list) for items in value.values())
    )


def _target(value: Any, where: str) -> Target:
    """Raises ValueError, without the place, for a record that is neither a topic nor a prompt."""
    if not isinstance(value, dict):
        raise ValueError(f"no object ({show(value)})")
    record = {field: item for field, item in value.items() if item is not None}
    kind = _class_of(record)
    topic = _text(record, "topic")
    messages: list[Message] | None = None
    if topic is None:
        found = read_prompt(value, where)
        if isinstance(found, Invalid):
            raise ValueError(found.reason)
        messages = [{"role": message["role"], "content": message["content"]} for message in found]
    if topic is not None and kind in (BENIGN, OTHER):
        raise ValueError(f"class = {kind!r} is only for prompts, and this is a topic")
    said = topic if topic is not None else " ".join(m["content"] for m in messages or [] if m["role"] == "user")
    language = _text(record, "language") or ("zh" if _HAN.search(said) else "en")
    category = _text(record, "category")
    if category is None and isinstance(record.get("type"), str) and _spelled(record["type"]) != kind:
        category = record["type"]
    secret, word = _text(record, "secret"), _text(record, "word")
    if topic is not None and (secret or word):
        raise ValueError("secret and word are only for prompts, and this is a topic")
    if topic is not None and language not in LANGUAGES:
        raise ValueError(f"language = {language!r} has no templates; legal are {choices(LANGUAGES)}")
    if secret is not None and not any(secret in m["content"] for m in messages or [] if m["role"] == "system"):
        raise ValueError("its secret is not in a system text, so it can't be leaked")
    return Target(topic, messages, kind, category, language, secret, word, value, where)


def _class_of(record: Mapping[str, Any]) -> str | None:
    legal = (*CLASSES, BENIGN)
    given = _text(record, "class")
    if given is not None:
        if _spelled(given) not in legal:
            raise ValueError(f"class = {given!r} is not valid; legal are {choices(legal)}")
        return _spelled(given)
    named = record.get("type")
    return _spelled(named) if isinstance(named, str) and _spelled(named) in legal else None


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z]+", "_", name.strip().lower())


def _text(record: Mapping[str, Any], field: str) -> str | None:
    text = record.get(field)
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise ValueError(f"{field} = {show(text)} is not a text")
    return text.strip() if text is not None else None
