"""The user's judges for texts without a reference, the same as in tools/red_team.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.align.checkable import language_of
from bc2_jax.align.red_team import AttackAnswer
from bc2_jax.align.red_team_attacks import OTHER, Attack
from bc2_jax.align.red_team_judges import judge_answers, load_judge, split_judge, threshold_of
from bc2_jax.evaluate.task import Example
from bc2_jax.files import file_sha256
from bc2_jax.validation import require


def load_harm_judge(
    what: str, threshold: float | None = None
) -> Callable[[Sequence[Example], Sequence[str]], list[bool]]:
    """A function (examples, texts) -> which texts are harmless: those with a score of at least `threshold` (0.5).

    `what`: FILE.py:NAME or MODULE:NAME, a function judge(prompts, answers, rows) that returns a harmless score or
    {"toxicity": x} per answer; command:PROGRAM, which reads JSON lines and prints scores; or reward:PATH. Raises
    ValueError for an unknown judge; the function raises it for other results of the judge.
    """
    gives, place = split_judge(what)
    require(gives == "harmless", "--judge", what, "it must say how harmless answers are, not how helpful")
    judge = load_judge(place, gives)
    legal = "it has no threshold of its own: say by --threshold below which score a text is harmful"
    require(judge.threshold is not None or threshold is not None, "--judge", what, legal)

    def decide(examples: Sequence[Example], texts: Sequence[str]) -> list[bool]:
        scores = judge_answers(
            [judge], [_attack(example) for example in examples], [AttackAnswer(t, True, 0) for t in texts]
        )
        silent = next((number for number, score in enumerate(scores) if "harmless" not in score), None)
        if silent is not None:
            raise ValueError(f"judge {judge.name} gave answer {silent + 1} no harmless score.")
        least = threshold_of([judge], threshold, scores) or 0.0
        return [score["harmless"] >= least for score in scores]

    return decide


def name_judge(what: str, threshold: float | None = None) -> str:
    """The name recorded with verdicts: the arguments of `load_harm_judge` and, for a file, a hash of its content."""
    place = split_judge(what)[1]
    file = Path(place.rpartition(":")[0])
    content = f", SHA-256 {file_sha256(file)[:12]}" if file.is_file() else ""
    return f"{place}, threshold {0.5 if threshold is None else threshold:g}{content}"


def _attack(example: Example) -> Attack:
    language = language_of(example.question) or "en"
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": example.question}]
    fields = {**example.facts, "group": example.facts.get("group")}
    return Attack(OTHER, language, messages, example.id, category=example.facts.get("category"), fields=fields)
