"""Each format from small files, and each way in which a record can be none of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bc2_jax.align.chat import check_messages
from bc2_jax.align.formats import Invalid, Sample, find_files, read_samples


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


HI = [user("hi"), answer("yo")]
SAID = [system("be kind"), *HI]
HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant:"
# Format, record, its messages.
FORMATS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("released", {"id": "1", "conversations": [human("hi"), gpt("yo")]}, HI),
    ("ShareGPT", {"conversations": [{"from": "system", "value": "be kind"}, human("hi"), gpt("yo")]}, SAID),
    ("ShareGPT", {"conversations": [human("hi"), gpt("yo")], "system": "be kind", "tools": "[]"}, SAID),
    ("OpenAI messages", {"messages": SAID, "tools": []}, SAID),
    ("OpenAI messages", {"messages": [system(" "), *HI], "system": None, "prompt": "hi"}, HI),
    ("OpenAI messages", {"messages": [user([{"type": "text", "text": t} for t in "hi"]), answer("yo")]}, HI),
    ("OpenAI messages", {"messages": [answer("greetings"), *HI]}, [answer("greetings"), *HI]),
    ("OpenAI messages", {"conversations": [turn | {"from": None} for turn in HI]}, HI),
    # As a table has it whose rows have other fields.
    ("ShareGPT", {"conversations": [human("hi") | {"role": None, "content": None}, gpt("yo")], "system": "be kind",
                  "chosen": None, "messages": None}, SAID),
    ("Alpaca", {"instruction": "hi", "input": "", "output": "yo"}, HI),
    ("Alpaca", {"instruction": "a", "input": "b", "output": "c", "system": "be kind", "history": [["hi", "yo"]]},
     [*SAID, user("a\nb"), answer("c")]),
    ("prompt-completion (text)", {"prompt": "hi", "completion": "yo", "label": True}, HI),
    ("prompt-completion (text)", {"prompt": HH, "completion": " x"}, [*HI, user("more"), answer("x")]),
    ("prompt-completion (messages)", {"prompt": SAID[:2], "completion": [answer("yo")]}, SAID),
    ("prompt-completion (messages)", {"prompt": [user("hi")], "completion": answer("yo")}, HI),
]  # fmt: skip
# Record, its messages, what the rejected answer is, how many messages come before.
PAIRS: list[tuple[dict[str, Any], list[dict[str, Any]], str, int]] = [
    ({"prompt": "hi", "chosen": "yo", "rejected": "no", "margin": 1}, HI, "no", 1),
    ({"prompt": SAID[:2], "chosen": [answer("yo")], "rejected": [answer("no")]}, SAID, "no", 2),
    ({"prompt": "hi", "chosen": SAID, "rejected": [*SAID[:2], answer("no")], "messages": SAID}, SAID, "no", 2),
    ({"chosen": [*HI, user("x"), answer("y")], "rejected": [*HI, user("x"), answer("z")]},
     [*HI, user("x"), answer("y")], "z", 3),
    ({"chosen": HH + " y", "rejected": HH + " z\n"}, [*HI, user("more"), answer("y")], "z", 3),
    ({"prompt": HH, "chosen": " y", "rejected": " z"}, [*HI, user("more"), answer("y")], "z", 3),
    ({"prompt": HH, "chosen": [answer("y")], "rejected": [answer("z")]}, [*HI, user("more"), answer("y")], "z", 3),
    ({"conversations": [human("hi")], "chosen": gpt("yo"), "rejected": gpt("no"), "system": "be kind"}, SAID, "no", 2),
    ({"instruction": "h", "input": "i", "chosen": "yo", "rejected": "no"}, [user("h\ni"), answer("yo")], "no", 1),
]  # fmt: skip
# Record, what is said of it.
BAD: list[tuple[Any, str]] = [
    ({"messages": [*HI, {"role": "tool", "content": "4"}]}, "tools, for which Baichuan 2 has no role (messages[2] h"),
    ({"conversations": [human("hi"), {"from": "observation", "value": "4"}]}, "tools, for which Baichuan 2 has"),
    ({"messages": HI, "tools": [{"name": "f"}]}, "tools, for which Baichuan 2 has no role (field 'tools')"),
    ({"messages": [user("hi"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tools, for which"),
    ({"messages": HI, "images": ["a.png"]}, "pictures, sound or video, which Baichuan 2 does not take"),
    ({"messages": [user([{"type": "image_url"}]), answer("yo")]}, "content that is not text alone (messages[0] = "),
    ({"messages": [user("hi"), answer("yo") | {"weight": 0}]}, "a message with a weight of its own (messages[1]: weig"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "unknown role (messages[0]: 'wizard'; legal are human, gpt,"),
    ({"messages": [user(" \n"), answer("yo")]}, "the user message is empty (messages[0])"),
    ({"messages": [user("hi"), answer("")]}, "the answer is empty (messages[1])"),
    ({"messages": [*HI, answer("yo")]}, "two answers in a row (messages[2]; they must take turns)"),
    ({"messages": [*HI, user("a"), user("b")]}, "two user messages in a row (messages[3]; they must take turns)"),
    ({"messages": [user("hi"), system("s"), answer("yo")]}, "a system text that is not the first message (mess"),
    ({"messages": SAID, "system": "be rude"}, "two system texts (one as a field, one as a message)"),
    ({"messages": [user("hi")]}, "no answer at all"),
    ({"prompt": "hi", "answer": "5"}, "no answer at all (its fields are prompt, answer; legal are conv"),
    ({"instruction": "hi", "output": None}, "no answer at all"),
    ({"messages": [system("s")]}, "a system text alone"),
    ({"messages": []}, "no message"),
    ({"messages": "hi"}, "messages is not a list of messages ('hi')"),
    ({"messages": ["hi"]}, "a message that is not an object (messages[0] = 'hi')"),
    ({"messages": [user(3), answer("yo")]}, "content is not text (messages[0]: 3)"),
    ({"messages": [user("\ud800"), answer("yo")]}, "a lone surrogate in the user message (messages[0]; at char"),
    ({"instruction": "hi", "output": 5}, "content is not text (messages[1]; 5)"),
    ({"instruction": "hi", "output": "yo", "history": ["a"]}, "history is not a list of [question, answer] (['a'])"),
    ({"prompt": "hi", "completion": "yo", "label": False}, "an answer that is marked as bad (label = False)"),
    ({"prompt": "hi", "chosen": "yo", "rejected": "yo"}, "chosen and rejected are equal"),
    ({"prompt": "hi", "chosen": "yo", "rejected": ""}, "in rejected, the answer is empty (messages[1])"),
    ({"chosen": HI, "rejected": [user("ho"), answer("yo")]}, "chosen and rejected are not two answers to the same mes"),
    ({"chosen": HI, "rejected": [*HI, user("a"), answer("b")]}, "chosen and rejected are not two answers to the same"),
    ({"chosen": "yo", "rejected": "no"}, "chosen and rejected without a prompt (the fields are chosen, rejected)"),
    ({"chosen": "yo", "rejected": HI, "prompt": "hi"}, "chosen is not a list of messages ('yo')"),
    ({"text": "once"}, "unknown shape (its fields are text; legal are conversations [{from, value}], messages [{role,"),
    ({}, "unknown shape (its fields are none; legal are"),
    (5, "no object (5)"),
]  # fmt: skip


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_each_shape_is_a_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record for _, record, _ in FORMATS])
    found = list(read_samples([path]))
    for number, (sample, (name, _, messages)) in enumerate(zip(found, FORMATS, strict=True), 1):
        assert sample == Sample(messages, f"{path}:{number}", name)
        check_messages(messages)


def test_pairs_of_answers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record for record, *_ in PAIRS])
    for sample, (_, messages, rejected, shared) in zip(read_samples([path]), PAIRS, strict=True):
        assert isinstance(sample, Sample)
        assert (sample.messages, sample.rejected, sample.shared) == (messages, [answer(rejected)], shared)
        assert sample.format.startswith("preference (")


def test_what_is_no_sample_is_named_and_reading_goes_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [r for record, _ in BAD for r in (record, FORMATS[0][1])])
    found = list(read_samples([path]))
    assert [sample.messages for sample in found[1::2] if isinstance(sample, Sample)] == [HI] * len(BAD)
    for number, (invalid, (_, reason)) in enumerate(zip(found[::2], BAD, strict=True)):
        assert isinstance(invalid, Invalid)
        assert str(invalid).startswith(f"{path}:{2 * number + 1}: {reason}")
        assert invalid.reason.startswith(invalid.kind) and invalid.kind.count("(") == 0


def test_a_last_question_without_an_answer_is_left_out(tmp_path: Path) -> None:
    (sample,) = read_samples([write_lines(tmp_path / "a.jsonl", [{"messages": [*SAID, user("and")]}])])
    assert sample == Sample(SAID, f"{tmp_path}/a.jsonl:1", "OpenAI messages", cut=True)


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.json.gz", "a.jsonl.zst", "list.json", "pretty.json.gz",
                                  "object.json", "a.parquet", "list.jsonl"])  # fmt: skip
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    records = [{"messages": HI, "n": i} for i in range(5)] + [{"messages": [user("ho")], "n": 5}]
    values: Any = {"version": 1, "data": records} if name.startswith("object") else records
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=4)
    else:
        whole = name.startswith(("list", "pretty", "object"))
        text = json.dumps(values, indent=None if name.startswith("list") else 2) if whole else ""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
        path.write_bytes(pack((text or lines).encode()))
    *samples, last = read_samples([tmp_path])
    assert [s.messages for s in samples if isinstance(s, Sample)] == [HI] * 5
    assert isinstance(last, Invalid) and last.reason == "no answer at all"
    place = {"list": "1 (item 6)", "pretty": "67 (item 6)", "object": "1 (item 6 of 'data')"}.get(
        name.split(".")[0], "6"
    )
    assert last.where == f"{path}:{place}"


def test_only_files_that_may_hold_conversations_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"messages": HI}])
    (tmp_path / "README.txt").write_text("about")
    found = find_files([tmp_path])
    assert [file.name for file in found.files] == ["a.jsonl"] and found.skipped == [str(tmp_path / "README.txt")]
    with pytest.raises(ValueError, match=r"DATA = '.*README.txt' is not valid: files must be .jsonl, .ndj"):
        find_files([tmp_path / "README.txt"])
