r"""Reads conversations, preference pairs and prompts from files in all common formats, recognised by their fields.

    released, ShareGPT     conversations: [{from: human | gpt | system, value}], or a system text beside them
    OpenAI messages        messages: [{role: system | user | assistant, content}]; content a text, or a list of such
    Alpaca                 instruction, output, and perhaps input, system, history: [[question, answer]]
    prompt-completion      prompt, completion; each a text or messages
    preference             chosen, rejected, and the prompt: as a field (text, messages or one of the above), or
                           repeated by both, as messages or as text with "\n\nHuman:" and "\n\nAssistant:"; the margin
                           as `margin`, or as score_chosen and score_rejected

A prompt (`read_prompt`) is any of these without its last answer; a `prompt` (text or messages); an `instruction`; a
text in a field `question`, `problem` or `query`; or a text in place of a record.

A field that is null counts as missing. Other fields are ignored, unless they change the meaning of the record: tools,
pictures, answers marked as bad. An unusable record becomes an `Invalid` with its file and line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.chat import Message, find_problem
from bc2_jax.data.records import Invalid, read_records
from bc2_jax.data.text_files import TextFile, TextFiles, find_text_files, printable
from bc2_jax.files import replaced
from bc2_jax.validation import choices, show

LEGAL_FILES = ".jsonl, .ndjson or .json, each plain, .zst or .gz, and .parquet"
LEGAL_SHAPES = (
    "conversations [{from, value}], messages [{role, content}], instruction + output, prompt + completion, "
    "[prompt +] chosen + rejected"
)
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
# Context that text can't show, but that the answers depend on.
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Weights of single messages: any value but 1 means that an answer is not to be learned.
_WEIGHTS = ("weight", "train", "loss")
_TOOLS_FOUND = "tools, for which Baichuan 2 has no role"
# Every record has one of these.
_FIELDS = {"messages", "conversations", "chosen", "prompt", "instruction"}
# Further fields with a question.
_QUESTIONS = ("question", "problem", "query")
# Fields with the messages of a preference pair.
_OF_A_PAIR = {
    "chosen", "rejected", "prompt", "messages", "conversations", "instruction", "input", "output", "history", "system"
}  # fmt: skip
_MESSAGE = {"role", "content", "from", "value"}
_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A valid conversation to train on (`check_messages`), or a preference pair."""

    messages: list[Message]
    """Of a preference pair, the prompt and the chosen answer."""
    where: str
    """File and line or row, from 1."""
    format: str
    rejected: list[Message] | None = None
    """Of a preference pair: the rejected answer, in place of messages[shared:]."""
    shared: int = 0
    """Of a preference pair: number of messages of the prompt."""
    cut: bool = False
    """Whether a last user message without an answer was left out."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a preference pair: the fields of the record that do not hold messages."""
    margin: float | None = None
    """Of a preference pair from `as_pair`: by how much the chosen answer is better, if known."""


class _Unusable(Exception):
    """Why a record is unusable; `kind` is the same for all records with the same fault."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind + (f" ({detail})" if detail else ""))


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSON Lines, atomically, and creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.write_text("".join(lines), encoding="utf-8")


def find_files(paths: Sequence[str | os.PathLike[str]], field: str = "DATA") -> TextFiles:
    """Files of conversations in `paths` (files or folders); raises as `find_text_files`, naming `field`."""
    return find_text_files(paths, field, ("jsonl", "parquet"), LEGAL_FILES)


def read_samples(paths: Sequence[str | os.PathLike[str]], field: str = "DATA") -> Iterator[Sample | Invalid]:
    """The samples of all files of conversations in `paths` (files or folders), in order."""
    for file in find_files(paths, field).files:
        yield from read_file(file)


def read_file(file: TextFile) -> Iterator[Sample | Invalid]:
    """The samples of one file, in order; an unusable record does not stop the reading."""
    for record in read_records(file.path, printable(file.path)):
        if isinstance(record, Invalid):
            yield record
        else:
            yield from read_record(record.value, record.where)


def read_record(value: Any, where: str) -> Iterator[Sample | Invalid]:
    """The sample of a record, or those of an object that only wraps a list of records."""
    for item, its_place in inner_records(value, where):
        try:
            yield _sample(item, its_place)
        except _Unusable as error:
            yield Invalid(str(error), its_place)


def inner_records(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    """A record and its place, or those of an object that only wraps a list of records."""
    inner = _inner_list(value)
    if inner is None:
        yield value, where
        return
    key, items = inner
    for number, item in enumerate(items, 1):
        yield item, f"{where} (item {number} of {key!r})"


def read_prompt(value: Any, where: str) -> list[Message] | Invalid:
    """The messages of a record without a last answer.

    The last message is the user's; that of a `prompt` may be the beginning of an answer.
    """
    try:
        return _prompt(value)
    except _Unusable as error:
        return Invalid(str(error), where)


def _record(value: Any) -> dict[str, Any]:
    """The fields of an object that are not null. Raises _Unusable for tools and media."""
    if not isinstance(value, Mapping):
        raise _Unusable("no object", show(value))
    record = {field: item for field, item in value.items() if item is not None}
    for fields, kind in ((_TOOLS, _TOOLS_FOUND), (_MEDIA, "pictures, sound or video, which Baichuan 2 does not take")):
        if field := next((field for field in fields if _holds_any(record.get(field))), None):
            raise _Unusable(kind, f"field {field!r}")
    return record


def _sample(value: Any, where: str) -> Sample:
    record = _record(value)
    if record.keys() >= {"chosen", "rejected"}:
        return _pair(record, where)
    found = _dialogue(record) or _completion(record) or _alpaca(record)
    if found is None:
        kind = "no answer at all" if record.keys() & {"prompt", "instruction"} else "unknown shape"
        raise _Unusable(kind, f"its fields are {choices(record) or 'none'}; legal are {LEGAL_SHAPES}")
    form, messages = found
    messages = _normalise(messages, record)
    roles = [message["role"] for message in messages]
    if "user" in roles and "assistant" not in roles:
        raise _Unusable("no answer at all")
    cut = roles[-2:] == ["assistant", "user"]
    messages = messages[:-1] if cut else messages
    _check(messages)
    return Sample(messages, where, form, cut=cut)


# ------------------------------------------------------------------------- readers: fields -> (format, raw messages)


def _dialogue(record: Mapping[str, Any]) -> tuple[str, list[Message]] | None:
    field = next((field for field in ("messages", "conversations") if field in record), None)
    if field is None:
        return None
    messages = _messages(record[field], field)
    if not any(isinstance(item, dict) and item.get("from") is not None for item in record[field]):
        return "OpenAI messages", messages
    has_system = "system" in record or any(message["role"] == "system" for message in messages)
    return ("ShareGPT" if has_system else "released"), messages


def _completion(record: Mapping[str, Any]) -> tuple[str, list[Message]] | None:
    if not record.keys() >= {"prompt", "completion"}:
        return None
    if record.get("label") in (False, 0):
        raise _Unusable("an answer that is marked as bad", f"label = {record['label']!r}")
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if _has_turns(prompt):
            return "prompt-completion (text)", _turns(prompt + completion)
        return "prompt-completion (text)", [_user(prompt), _assistant(completion)]
    return "prompt-completion (messages)", _messages(prompt, "prompt") + _messages(completion, "completion")


def _alpaca(record: Mapping[str, Any]) -> tuple[str, list[Message]] | None:
    if not record.keys() >= {"instruction", "output"}:
        return None
    return "Alpaca", [*_instruction(record), _assistant(record["output"])]


def _instruction(record: Mapping[str, Any]) -> list[Message]:
    """History and question of an Alpaca record."""
    history = record.get("history", [])
    legal = isinstance(history, Sequence) and not isinstance(history, str)
    if not legal or not all(isinstance(turn, Sequence) and len(turn) == 2 for turn in history):
        raise _Unusable("history is not a list of [question, answer]", show(history))
    before = [message for question, answer in history for message in (_user(question), _assistant(answer))]
    parts = [record["instruction"], record.get("input", "")]
    for field, part in zip(("instruction", "input"), parts, strict=True):
        if not isinstance(part, str):
            raise _Unusable("content is not text", f"{field} = {show(part)}")
    return [*before, _user("\n".join(part for part in parts if part))]


def _pair(record: Mapping[str, Any], where: str) -> Sample:
    answers = [record["chosen"], record["rejected"]]
    form = "text" if all(isinstance(answer, str) for answer in answers) else "messages"
    if form == "text":
        prompt = record.get("prompt", "")
        if isinstance(prompt, str) and all(_has_turns(prompt + answer) for answer in answers):
            chosen, rejected = (_turns(prompt + answer) for answer in answers)
        else:
            chosen, rejected = ([*_question(record), _assistant(answer)] for answer in answers)
    else:
        chosen, rejected = _messages(answers[0], "chosen"), _messages(answers[1], "rejected")
        if all(answer and answer[0]["role"] == "assistant" for answer in (chosen, rejected)):
            question = _question(record)
            chosen, rejected = [*question, *chosen], [*question, *rejected]
    chosen, rejected = _normalise(chosen, record), _normalise(rejected, record)
    _check(chosen)
    _check(rejected, "in rejected, ")
    if chosen == rejected:
        raise _Unusable("chosen and rejected are equal")
    shared = next(i for i, both in enumerate(itertools.zip_longest(chosen, rejected)) if both[0] != both[1])
    if any(answer[shared:][:1] == [] or answer[shared]["role"] != "assistant" for answer in (chosen, rejected)):
        kind = "chosen and rejected are not two answers to the same messages"
        raise _Unusable(kind, f"they part at messages[{shared}]")
    further = {field: value for field, value in record.items() if field not in _OF_A_PAIR}
    return Sample(chosen, where, f"preference ({form})", rejected[shared:], shared, fields=further)


def _question(record: Mapping[str, Any]) -> list[Message]:
    """The prompt of a preference pair whose answers do not repeat it."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        turns = _turns(prompt) if _has_turns(prompt) else [_user(prompt)]
        # The answer follows text that ends in "Assistant:".
        return turns[:-1] if turns[-1] == _assistant("") else turns
    if prompt is not None:
        return _messages(prompt, "prompt")
    if found := _dialogue(record):
        return found[1]
    if "instruction" in record:
        return _instruction(record)
    raise _Unusable("chosen and rejected without a prompt", f"the fields are {choices(record)}")


def _prompt(value: Any) -> list[Message]:
    record = {"prompt": value} if isinstance(value, str) else _record(value)
    if record.get("prompt") is not None or "instruction" in record:
        messages, has_answer = _question(record), False
    elif found := _dialogue(record):
        messages, has_answer = found[1], True
    elif "chosen" in record:
        chosen = record["chosen"]
        messages = _turns(chosen) if isinstance(chosen, str) else _messages(chosen, "chosen")
        has_answer = True
    elif field := next((field for field in _QUESTIONS if field in record), None):
        messages, has_answer = [_user(record[field])], False
    else:
        legal = "prompt, messages, conversations, instruction, chosen, " + ", ".join(_QUESTIONS)
        raise _Unusable("no prompt", f"its fields are {choices(record) or 'none'}; one of these is needed: {legal}")
    messages = _normalise(messages, record)
    if has_answer and [message["role"] for message in messages[-1:]] == ["assistant"]:
        messages = messages[:-1]
    if "user" not in [message["role"] for message in messages]:
        raise _Unusable("no question", "no message is the user's")
    _check(messages if messages[-1]["role"] == "assistant" else [*messages, _assistant("?")])
    return messages


# --------------------------------------------------------------------------------------------------------------- pieces


def _holds_any(value: Any) -> bool:
    return value.strip() not in ("", "[]", "{}", "null", "None") if isinstance(value, str) else bool(value)


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def _messages(value: Any, field: str) -> list[Message]:
    """The messages of a field: a list, or a single one."""
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise _Unusable(f"{field} is not a list of messages", show(value))
    return [_message(item, f"{field}[{place}]") for place, item in enumerate(items)]


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise _Unusable("a message that is not an object", f"{name} = {show(item)}")
    item = {field: value for field, value in item.items() if value is not None}
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    others = item.keys() - _MESSAGE
    if role in _TOOL_ROLES or any(_holds_any(item[field]) for field in others.intersection(_TOOLS)):
        raise _Unusable(_TOOLS_FOUND, f"{name} has the role {show(role)}")
    if not isinstance(role, str) or role not in _ROLES:
        raise _Unusable("unknown role", f"{name}: {show(role)}; legal are {choices(_ROLES)}")
    for field in others.intersection(_WEIGHTS):
        if item[field] != 1:
            raise _Unusable("a message with a weight of its own", f"{name}: {field} = {show(item[field])}")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise _Unusable("content that is not text alone", f"{name} = {show(content)}")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise _Unusable("content is not text", f"{name}: {show(content)}")
    return {"role": _ROLES[role], "content": content}


def _has_turns(text: str) -> bool:
    """Whether text is a whole conversation, with "Human:" and "Assistant:" as in hh-rlhf."""
    return _TURN.match(text) is not None


def _turns(text: str) -> list[Message]:
    """The messages of such a text, stripped."""
    parts = _TURN.split(text)[1:]
    makers = {"Human": _user, "Assistant": _assistant}
    return [makers[name](content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]


def _normalise(messages: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """Adds the system text of the record, and empties blank texts."""
    system = record.get("system", "")
    if not isinstance(system, str):
        raise _Unusable("content is not text", f"system = {show(system)}")
    if system.strip():
        if [message["role"] for message in messages[:1]] == ["system"] and messages[0]["content"] != system:
            raise _Unusable("two system texts", "one as a field, one as a message")
        if [message["role"] for message in messages[:1]] != ["system"]:
            messages = [{"role": "system", "content": system}, *messages]
    blank = [not isinstance(m["content"], str) or bool(m["content"].strip()) for m in messages]
    return [
        message if filled else {**message, "content": ""}
        for message, filled in zip(messages, blank, strict=True)
        if filled or message["role"] != "system"
    ]


def _check(messages: list[Message], of: str = "") -> None:
    if problem := find_problem(messages):
        name = f"messages[{problem.place}]" if problem.place is not None else ""
        raise _Unusable(of + problem.kind, "; ".join(filter(None, (name, problem.detail))))


def _inner_list(value: Any) -> tuple[str, list[Any]] | None:
    """Field and items of an object that only wraps a list of records; None for any other."""
    if not isinstance(value, Mapping) or value.keys() & _FIELDS.union(_QUESTIONS):
        return None
    lists = [(field, items) for field, items in value.items() if isinstance(items, list)]
    lists = [(field, items) for field, items in lists if any(isinstance(item, Mapping) for item in items)]
    return lists[0] if len(lists) == 1 else None
