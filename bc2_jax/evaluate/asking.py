"""Benchmarks put to a model: which items, how their prompts fit, what is recorded of each answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bc2_jax.agreement import any_text, require_agreement
from bc2_jax.evaluate.encoding import Request, encode_pairs
from bc2_jax.evaluate.records import Record, is_finite
from bc2_jax.evaluate.scorer import NEAR_TIE, Progress, Scorer
from bc2_jax.evaluate.task import Example, Fitted, Task, fit_shots
from bc2_jax.evaluate.tasks import find_task
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class Questions:
    """A benchmark whose files were read: what is asked of it."""

    task: Task
    examples: Sequence[Example]
    items: Sequence[str]
    """Ids of all items, in their order; those asked are some of them."""
    left_out: Mapping[str, int]
    notes: Sequence[str]
    shots: int
    prompts_sha256: str
    """Of all items, whichever are asked."""

    @property
    def facts(self) -> dict[str, object]:
        """What has to be the same on all processes."""
        return {"shots": self.shots, "items": len(self.examples), "prompts (SHA-256)": self.prompts_sha256}


def read_questions(
    names: Sequence[str], data_dir: Path, *, limit: int | None = None, shots: int | None = None
) -> list[Questions]:
    """The benchmarks of these names from their released files below `data_dir`.

    `limit` items of each are asked, taken evenly from its groups; those of a smaller limit are among those of a larger
    one. With `shots` a prompt has only the first of them. Raises ValueError without a name, for an unknown one, for
    numbers out of range, and, with a sentence for each benchmark, where files are missing or are not what they should
    be. All processes call it; it raises on all of them what it finds on one, or if they have read other prompts.
    """
    require(bool(names), "tasks", ",".join(names), "it must name at least one benchmark")
    require(limit is None or limit > 0, "limit", limit, "it must be positive")
    require(shots is None or shots >= 0, "shots", shots, "it must be at least 0")
    tasks = [find_task(name) for name in dict.fromkeys(names)]
    found, problems = [], []
    for task in tasks:
        try:
            found.append(_read(task, data_dir, limit, shots))
        except (OSError, ValueError) as error:
            problems.append(f"{task.name}: {error}")
    if problem := any_text("\n".join(problems)):
        raise ValueError(problem)
    require_agreement({one.task.name: one.facts for one in found})
    return found


def _read(task: Task, data_dir: Path, limit: int | None, shots: int | None) -> Questions:
    loaded = task.load(data_dir)
    examples = loaded.examples
    require(bool(examples), "data_dir", str(data_dir), "it holds no item of this benchmark")
    counts = Counter(example.id for example in examples)
    twice = next((item for item, count in counts.items() if count > 1), None)
    require(twice is None, "data_dir", str(data_dir), f"two items are called {twice!r}")
    notes = list(loaded.notes)
    if shots is not None:
        most = max(len(example.shots) for example in examples)
        if shots > most:
            notes.append(f"There are only {most} shots, not {shots}.")
        examples = [dataclasses.replace(example, shots=example.shots[:shots]) for example in examples]
    digest = hashlib.sha256()
    for e in examples:
        about = (e.id, e.header, e.shots, e.question, e.choices, e.bare, e.gold, e.target, dict(e.facts))
        digest.update(json.dumps(about, sort_keys=True).encode() + b"\n")
    return Questions(
        task, choose_evenly(examples, limit), [example.id for example in examples], loaded.left_out, notes,
        max(len(example.shots) for example in examples), digest.hexdigest(),
    )  # fmt: skip


def choose_evenly(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """`limit` examples, without one all of them, in their order: the first of every group, then the second ones ..."""
    if limit is None or limit >= len(examples):
        return list(examples)
    seen: Counter[str] = Counter()
    rounds = []
    for place, example in enumerate(examples):
        rounds.append((seen[example.group], place))
        seen[example.group] += 1
    return [examples[place] for place in sorted(place for _, place in sorted(rounds)[:limit])]


def parts_of(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Examples that are asked together, about `size`: whole groups where they are no larger, as those share shots."""
    start = 0
    for end in range(1, len(examples) + 1):
        is_border = end == len(examples) or examples[end].group != examples[end - 1].group
        if end - start >= 2 * size or (is_border and end - start >= size) or end == len(examples):
            yield examples[start:end]
            start = end


def ask(
    task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress = lambda done, count: None
) -> list[Record]:
    """The records of examples; of code, what was generated is not run yet. All processes call it and get the same.

    Raises ValueError if the model gives log-probabilities that are not finite.
    """
    is_choice = task.kind in ("letters", "options")
    records = (_ask_choices if is_choice else _ask_to_write)(task, examples, scorer, progress)
    broken = next((record for record in records if not is_finite(record)), None)
    if broken is not None:
        raise ValueError(f"The model gives log-probabilities that are not finite, first for {broken['id']!r}.")
    return records


# -------------------------------------------------------------------------------------------------------------- choices


def _ask_choices(task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress) -> list[Record]:
    fitted: list[Fitted] = []
    pairs: list[tuple[str, str]] = []
    places: list[dict[str, int]] = []  # of each example: a choice -> its place in pairs
    for example in examples:
        texts = list(dict.fromkeys((*example.choices, *example.bare)))
        longest = max(map(len, scorer.tokenizer.encode_batch(texts)))
        prompt = _fit(example, scorer.max_length - longest, scorer)
        fitted.append(prompt)
        places.append({text: len(pairs) + place for place, text in enumerate(texts)})
        pairs += [(prompt.text, text) for text in texts]
    encoded = encode_pairs(scorer.tokenizer, pairs, scorer.prefix_id)
    requests = [Request(one.context, one.continuation) for one in encoded]

    def tell(done: int, count: int) -> None:
        progress(done * len(examples) // max(count, 1), len(examples))

    scores = scorer.score(requests, progress=tell)
    near = NEAR_TIE[scorer.model.compute.dtype]
    records = []
    for example, prompt, place in zip(examples, fitted, places, strict=True):
        log_probs = {text: float(scores[number].log_prob) for text, number in place.items()}
        record = _about(example, prompt) | {
            "cut": max(scores[number].cut for number in place.values()),
            "fallback": any(encoded[number].fallback for number in place.values()),
            "choices": list(example.choices), "log_probs": [log_probs[text] for text in example.choices],
            "gold": list(example.gold),
        }  # fmt: skip
        if task.kind == "letters":
            ways = {"as_shown": record["log_probs"]}
            if example.bare:
                record |= {"bare": list(example.bare), "bare_log_probs": [log_probs[text] for text in example.bare]}
                ways["bare"] = record["bare_log_probs"]
            names = [text.strip() for text in example.bare or example.choices]
        else:
            lengths = example.lengths or tuple(map(len, example.choices))
            each = zip(record["log_probs"], lengths, strict=True)
            ways = {"acc": record["log_probs"], "acc_norm": [value / max(length, 1) for value, length in each]}
            names = [text.strip() for text in example.choices]
        spellings = (record["log_probs"], record.get("bare_log_probs", ()))
        record["near_tie"] = any(_lead(values) < near for values in spellings)
        records.append(record | _answers(ways, names, example.gold))
    return records


def _answers(ways: Mapping[str, Sequence[float]], names: Sequence[str], gold: Sequence[int]) -> Record:
    """What the scores of the choices, by way of scoring, say; of equal ones the first counts."""
    best = {way: max(range(len(scores)), key=scores.__getitem__) for way, scores in ways.items()}
    return {
        "answers": {way: names[place] for way, place in best.items()},
        "right": {way: place in gold for way, place in best.items()} if gold else {},
    }


def _lead(scores: Sequence[float]) -> float:
    """By how much the best is above the second."""
    best = sorted(scores, reverse=True)[:2]
    return best[0] - best[1] if len(best) == 2 else math.inf


def _fit(example: Example, room: int, scorer: Scorer) -> Fitted:
    limit = min(room, example.prompt_limit or room)

    def count(text: str) -> int:
        """Tokens; where the text has too few bytes to have more than there is room for, these: a token has one."""
        size = len(text.encode())
        return size if size <= limit and example.drop != "longest" else len(scorer.tokenizer.encode(text))

    return fit_shots(example, room, count)


def _about(example: Example, prompt: Fitted) -> Record:
    return {
        "id": example.id, "group": example.group, "prompt": prompt.text, "dropped_shots": prompt.dropped,
        "header_dropped": prompt.header_dropped,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- generation


def _longest_answer(task: Task, scorer: Scorer) -> int:
    """New tokens at most: those of the benchmark, or half of the model's length if that is less."""
    return min(task.max_new_tokens, max(1, scorer.generation_length // 2))


def _ask_to_write(task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress) -> list[Record]:
    most = _longest_answer(task, scorer)
    fitted = [_fit(example, scorer.generation_length - most, scorer) for example in examples]
    written = scorer.generate_texts([(prompt.text, task.stops, most) for prompt in fitted], progress=progress)
    records = []
    for example, prompt, one in zip(examples, fitted, written, strict=True):
        record = _about(example, prompt) | {
            "cut": one.cut, "text": one.text, "reason": one.reason, "tokens": one.tokens, "most_tokens": most,
            "target": example.target, "answers": {}, "right": {}, "near_tie": False,
        }  # fmt: skip
        if task.kind == "generation" and task.judge is not None:
            verdict = task.judge(example, one.text)
            record |= {"answers": {"exact": verdict.answer}, "right": {"exact": verdict.right}}
        records.append(record)
    return records
