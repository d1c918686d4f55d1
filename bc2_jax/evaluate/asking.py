"""Puts benchmark items to a model: chooses items, fits prompts, records answers."""

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
    """A loaded benchmark: what to ask."""

    task: Task
    examples: Sequence[Example]  # those to ask, some of all items
    items: Sequence[str]  # ids of all items, in order
    left_out: Mapping[str, int]
    notes: Sequence[str]
    shots: int
    prompts_sha256: str  # of all items


def read_questions(
    names: Sequence[str], data_dir: Path, *, limit: int | None = None, shots: int | None = None
) -> list[Questions]:
    """Loads benchmarks from their released files in `data_dir`.

    `limit`: items of each to ask, spread evenly over its groups; a smaller limit asks a subset of a larger one's.
    `shots`: keep the first so many of each prompt. Raises ValueError for no or unknown names, numbers out of range, and
    missing or invalid files (one sentence per benchmark). All processes call it; it raises on all of them if one fails
    or their prompts differ.
    """
    require(bool(names), "tasks", ",".join(names), "it must name at least one benchmark")
    require(limit is None or limit > 0, "limit", limit, "it must be positive")
    require(shots is None or shots >= 0, "shots", shots, "it must be at least 0")
    found, problems = [], []
    for task in [find_task(name) for name in dict.fromkeys(names)]:
        try:
            found.append(_read(task, data_dir, limit, shots))
        except (OSError, ValueError) as error:
            problems.append(f"{task.name}: {error}")
    if problem := any_text("\n".join(problems)):
        raise ValueError(problem)
    require_agreement(
        {
            q.task.name: {"shots": q.shots, "items": len(q.examples), "prompts (SHA-256)": q.prompts_sha256}
            for q in found
        }
    )  # fmt: skip
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
    """`limit` examples (all without one) in their order: the first of every group, then the second ones, ..."""
    if limit is None or limit >= len(examples):
        return list(examples)
    seen: Counter[str] = Counter()
    rounds = []
    for place, example in enumerate(examples):
        rounds.append((seen[example.group], place))
        seen[example.group] += 1
    return [examples[place] for place in sorted(place for _, place in sorted(rounds)[:limit])]


def parts_of(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Parts of about `size` examples to ask together; small groups stay whole, as they share shots."""
    start = 0
    for end in range(1, len(examples) + 1):
        is_border = end == len(examples) or examples[end].group != examples[end - 1].group
        if end - start >= 2 * size or (is_border and end - start >= size) or end == len(examples):
            yield examples[start:end]
            start = end


def ask(
    task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress = lambda done, count: None
) -> list[Record]:
    """The records of examples; generated code is not run yet. All processes call it and get the same.

    Raises ValueError if the model's log-probabilities are not finite.
    """
    ask_all = _score_choices if task.kind in ("letters", "options") else _generate
    records = ask_all(task, examples, scorer, progress)
    broken = next((record for record in records if not is_finite(record)), None)
    if broken is not None:
        raise ValueError(f"The model gives log-probabilities that are not finite, first for {broken['id']!r}.")
    return records


def _score_choices(task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress) -> list[Record]:
    fitted: list[Fitted] = []
    pairs: list[tuple[str, str]] = []
    places: list[dict[str, int]] = []  # of each example: choice -> index in pairs
    for example in examples:
        texts = list(dict.fromkeys((*example.choices, *example.bare)))
        longest = max(map(len, scorer.tokenizer.encode_batch(texts)))
        prompt = _fit(example, scorer.max_length - longest, scorer)
        fitted.append(prompt)
        places.append({text: len(pairs) + place for place, text in enumerate(texts)})
        pairs += [(prompt.text, text) for text in texts]
    encoded = encode_pairs(scorer.tokenizer, pairs, scorer.prefix_id)

    def tell(done: int, count: int) -> None:
        progress(done * len(examples) // max(count, 1), len(examples))

    scores = scorer.score([Request(one.context, one.continuation) for one in encoded], progress=tell)
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
        names = [text.strip() for text in example.bare or example.choices]
        if task.kind == "letters":
            ways = {"as_shown": record["log_probs"]}
            if example.bare:
                record |= {"bare": list(example.bare), "bare_log_probs": [log_probs[text] for text in example.bare]}
                ways["bare"] = record["bare_log_probs"]
        else:
            lengths = example.lengths or tuple(map(len, example.choices))
            each = zip(record["log_probs"], lengths, strict=True)
            ways = {"acc": record["log_probs"], "acc_norm": [value / max(length, 1) for value, length in each]}
        spellings = (record["log_probs"], record.get("bare_log_probs", ()))
        # max takes the first of equal scores.
        best = {way: max(range(len(values)), key=values.__getitem__) for way, values in ways.items()}
        records.append(
            record
            | {
                "near_tie": any(_lead(values) < near for values in spellings),
                "answers": {way: names[index] for way, index in best.items()},
                "right": {way: index in example.gold for way, index in best.items()} if example.gold else {},
            }
        )
    return records


def _lead(scores: Sequence[float]) -> float:
    """The best score minus the second."""
    best = sorted(scores, reverse=True)[:2]
    return best[0] - best[1] if len(best) == 2 else math.inf


def _fit(example: Example, room: int, scorer: Scorer) -> Fitted:
    limit = min(room, example.prompt_limit or room)

    def count(text: str) -> int:
        """Tokens. A text has at most as many as bytes, so one with few bytes need not be encoded."""
        size = len(text.encode())
        return size if size <= limit and example.drop != "longest" else len(scorer.tokenizer.encode(text))

    return fit_shots(example, room, count)


def _about(example: Example, prompt: Fitted) -> Record:
    return {
        "id": example.id, "group": example.group, "prompt": prompt.text, "dropped_shots": prompt.dropped,
        "header_dropped": prompt.header_dropped,
    }  # fmt: skip


def _generate(task: Task, examples: Sequence[Example], scorer: Scorer, progress: Progress) -> list[Record]:
    most = min(task.max_new_tokens, max(1, scorer.generation_length // 2))
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
