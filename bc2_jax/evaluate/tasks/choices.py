"""Multiple choice: prompts that end where the letter of the answer belongs, in the wording of the official scripts."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bc2_jax.evaluate.task import Drop, Example

LETTERS = "ABCDE"
SEED = 123
"""Of every random choice of shots."""


class Item(NamedTuple):
    """A question with its options."""

    id: str
    question: str
    options: tuple[str, ...]
    gold: int | None
    """Index of the right option; None if it is not published."""
    letters: str = ""
    """Given where the options stand in the question's text and `options` is ()."""


class Wording(NamedTuple):
    """How a benchmark spells its prompts."""

    header: str
    """Its {} is the subject."""
    cue: str
    """What comes before the letter; a blank at its end belongs to the letter."""
    end: str
    """After the letter of a shot."""
    start: str = ""
    """Before a question."""

    def ask(self, item: Item) -> str:
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False))
        return f"{self.start}{item.question}{options}{self.cue.rstrip(' ')}"

    def show(self, item: Item) -> str:
        """A shot: the question with its answer."""
        assert item.gold is not None, "a shot needs its answer"
        return f"{self.ask(item)}{' ' * self.cue.endswith(' ')}{LETTERS[item.gold]}{self.end}"


CEVAL = Wording("以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案：", "\n")
# The subject is spelt with a blank before each of its words, which makes two after "about".
MMLU = Wording("The following are multiple choice questions (with answers) about {}.\n\n", "\nAnswer: ", "\n\n")
CMMLU = Wording("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "\n答案是：", "\n\n", start="题目：")


def make_examples(
    items: Iterable[Item],
    shots: Sequence[Item],
    wording: Wording,
    subject: str,
    group: str,
    drop: Drop = "last",
    prompt_limit: int | None = None,
) -> list[Example]:
    """Asks each of `items` after the same shots."""
    header = wording.header.format(subject)
    shown = tuple(wording.show(shot) for shot in shots)
    space = " " * wording.cue.endswith(" ")
    examples = []
    for item in items:
        letters = item.letters or LETTERS[: len(item.options)]
        examples.append(
            Example(
                id=item.id,
                group=group,
                header=header,
                shots=shown,
                question=wording.ask(item),
                choices=tuple(space + letter for letter in letters),
                bare=tuple(letters),
                gold=() if item.gold is None else (item.gold,),
                drop=drop,
                prompt_limit=prompt_limit,
            )
        )
    return examples


def choose(items: Iterable[Item], count: int) -> list[Item]:
    """`count` of them at random: those whose ids have the smallest SHA-256 with the seed, whatever their order."""
    return heapq.nsmallest(count, items, key=lambda item: hashlib.sha256(f"{SEED}:{item.id}".encode()).digest())


def partition(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """`count` random items as shots, fewer if nothing were left to ask, and the others in their order."""
    shots = choose(items, min(count, max(len(items) - 1, 0)))
    chosen = {item.id for item in shots}
    return shots, [item for item in items if item.id not in chosen]


def too_few(shots: Sequence[Item], count: int, place: object) -> list[str]:
    """A note if there are fewer shots than the protocol has."""
    return [f"{place}: {len(shots)} shots instead of {count}."] if len(shots) < count else []
