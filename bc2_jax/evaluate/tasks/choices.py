"""Multiple-choice prompts, which end where the letter of the answer follows, worded as in the official scripts."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bc2_jax.evaluate.task import Drop, Example, Loaded

LETTERS = "ABCDE"
SEED = 123  # of every random choice of shots
SHOTS = 5


class Item(NamedTuple):
    """A question with its options."""

    id: str
    question: str
    options: tuple[str, ...]
    gold: int | None  # index of the right option; None if it is not published
    letters: str = ""  # the legal letters if the question's text contains the options and `options` is ()


class Wording(NamedTuple):
    """A benchmark's prompt format."""

    header: str  # {} is the subject
    cue: str  # text before the letter; a space at its end belongs to the letter
    end: str  # text after the letter of a shot
    start: str = ""  # text before a question

    @property
    def space(self) -> str:
        return " " if self.cue.endswith(" ") else ""

    def ask(self, item: Item) -> str:
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False))
        return f"{self.start}{item.question}{options}{self.cue.rstrip(' ')}"

    def show(self, item: Item) -> str:
        """A shot: the question with its answer."""
        assert item.gold is not None, "a shot needs its answer"
        return f"{self.ask(item)}{self.space}{LETTERS[item.gold]}{self.end}"


CEVAL = Wording("以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案：", "\n")
MMLU = Wording("The following are multiple choice questions (with answers) about {}.\n\n", "\nAnswer: ", "\n\n")
CMMLU = Wording("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "\n答案是：", "\n\n", start="题目：")


class Group(NamedTuple):
    """The items of one subject, and how they are asked."""

    name: str
    subject: str  # in the header
    wording: Wording
    items: list[Item]


def make_examples(
    items: Iterable[Item], shots: Sequence[Item], wording: Wording, subject: str, group: str, drop: Drop = "last",
    prompt_limit: int | None = None,
) -> list[Example]:  # fmt: skip
    """Asks each of `items` after the same shots."""
    header, shown = wording.header.format(subject), tuple(map(wording.show, shots))
    examples = []
    for item in items:
        letters = tuple(item.letters or LETTERS[: len(item.options)])
        choices = tuple(wording.space + letter for letter in letters)
        gold = () if item.gold is None else (item.gold,)
        examples.append(
            Example(
                item.id, group, wording.ask(item), header, shown, choices, letters,
                gold=gold, drop=drop, prompt_limit=prompt_limit,
            )
        )  # fmt: skip
    return examples


def ask_after_random_shots(groups: Iterable[Group], left_out: Counter[str], notes: Sequence[str]) -> Loaded:
    """Of each group SHOTS random items become shots and the others are asked."""
    examples, notes = [], list(notes)
    for group in groups:
        shots, asked = partition(group.items, SHOTS)
        notes += too_few(shots, group.name)
        examples += make_examples(asked, shots, group.wording, group.subject, group.name)
        left_out["used as shots"] += len(shots)
    return Loaded(examples, +left_out, tuple(notes))


def choose(items: Iterable[Item], count: int) -> list[Item]:
    """`count` random items: those whose ids have the smallest SHA-256 with SEED, whatever their order."""
    return heapq.nsmallest(count, items, key=lambda item: hashlib.sha256(f"{SEED}:{item.id}".encode()).digest())


def partition(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """(`count` random items, the others in their order); at least one other remains."""
    shots = choose(items, min(count, max(len(items) - 1, 0)))
    chosen = {item.id for item in shots}
    return shots, [item for item in items if item.id not in chosen]


def too_few(shots: Sequence[Item], place: object) -> list[str]:
    """A note if there are fewer than SHOTS shots."""
    return [f"{place}: {len(shots)} shots instead of {SHOTS}."] if len(shots) < SHOTS else []
