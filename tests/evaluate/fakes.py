"""A scorer without a model: its numbers follow from the ids alone; and benchmarks without files."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np

from bc2_jax.evaluate.generation import Generated
from bc2_jax.evaluate.scorer import Score, ScorerStats
from bc2_jax.evaluate.task import Example, Loaded, Task, Verdict


def noise(*what: object) -> float:
    """In 0..1, the same for the same things."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big") / 2**32


class FakeScorer:
    """`score`, `generate_texts` and what else is used of a `Scorer`. `asked` has how many requests each call had."""

    def __init__(self, tokenizer, max_length: int = 10_000, seed: int = 0) -> None:
        self.tokenizer, self.prefix_id, self.seed = tokenizer, 1, seed
        self.max_length = self.generation_length = max_length
        self.model = SimpleNamespace(compute=SimpleNamespace(dtype="float32"))
        self.stats, self.asked = ScorerStats(), []

    def score(self, requests, progress=None):
        self.asked.append(len(requests))
        found = []
        for context, continuation in requests:
            cut = max(len(context) + len(continuation) - self.max_length - 1, 0)
            value = -10 * noise(self.seed, list(context), list(continuation))
            found.append(Score(value, False, np.float32([value]), False, cut))
            if progress is not None:
                progress(len(found), len(requests))
        return found

    def generate_texts(self, prompts, progress=None, **settings):
        self.asked.append(len(prompts))
        return [Generated(f" {round(2 * noise(self.seed, prompt))}", "stopped", 2, 0) for prompt, _, _ in prompts]


def letters(count: int, groups: int = 3, shots: int = 2, **changes) -> list[Example]:
    made = []
    for number in range(count):
        group = f"g{number * groups // count}"
        made.append(
            Example(
                id=f"{group}/{number}",
                group=group,
                header=f"{group}\n",
                shots=(f"{group} is A\n", "so B\n")[:shots],
                question=f"number {number} is",
                choices=(" A", " B", " C"),
                bare=("A", "B", "C"),
                gold=(number % 3,),
            )  # fmt: skip
        )
    return [Example(**{**{f: getattr(e, f) for f in e.__dataclass_fields__}, **changes}) for e in made]


def task_of(examples: list[Example], **changes) -> Task:
    fields = {
        "name": "quiz", "title": "Quiz", "source": "nowhere.", "kind": "letters", "shots": 2,
        "load": lambda data_dir: Loaded(examples),
    }  # fmt: skip
    return Task(**{**fields, **changes})


def to_write(count: int, **changes) -> Task:
    examples = [Example(str(n), "all", f"{n}?", target=str(n % 2), facts={"n": n}) for n in range(count)]
    fields = {
        "kind": "generation", "stops": ("\n",), "max_new_tokens": 4,
        "judge": lambda example, text: Verdict(text.strip() == example.target, text.strip()),
    }  # fmt: skip
    return task_of(examples, **{**fields, **changes})
