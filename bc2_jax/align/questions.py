"""Held-out questions asked at evaluations: share of answers that end, and that are right."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.text import Text

from bc2_jax.align.chat import Message, fit_prompt
from bc2_jax.align.formats import Sample, read_samples, write_records
from bc2_jax.align.row_preparation import QUESTIONS
from bc2_jax.config import AskedConfig, QuestionsConfig
from bc2_jax.infer import engine
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.terminal import make_table
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.job import Examine, Progress
from bc2_jax.train.loop import Start
from bc2_jax.validation import require

FOLDER = "answers"
"""Folder in the workdir, with step_N.jsonl of each evaluation."""
AT_ONCE = 64
"""Batch size."""


class Question(NamedTuple):
    """A conversation that the model is to continue, as `messages` and as prompt `ids`, and the expected answer."""

    messages: list[Message]
    expected: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class AnsweredQuestion:
    """A line of step_N.jsonl."""

    messages: list[Message]
    expected: str
    answer: str
    ended: bool
    """By eos, not at max_new_tokens."""
    right: bool
    """Ended and equal to `expected`, apart from surrounding blanks."""
    tokens: int
    """Length of the answer, its eos included."""


def read_questions(path: str | None, config: QuestionsConfig, most: int, tokenizer: Tokenizer) -> list[Question]:
    """The questions of a file in any format of `formats`, none without a `path`; `most` is model.model_max_length.

    Raises ValueError or FileNotFoundError, naming field or place, for a file without questions, an unusable record, and
    if the longest answer leaves no room for a question.
    """
    if path is None:
        return []
    require(
        config.max_new_tokens < most, "questions.max_new_tokens", config.max_new_tokens,
        f"it must be below model.model_max_length = {most}",
    )  # fmt: skip
    found = []
    for sample in itertools.islice(read_samples([path], "questions.path"), config.limit or None):
        if not isinstance(sample, Sample):
            raise ValueError(f"questions.path: {sample.where}: {sample.reason}.")
        *messages, expected = sample.messages
        require(
            any(message["role"] == "user" for message in messages), "questions.path", path,
            f"the conversation at {sample.where} has no question before its answer",
        )  # fmt: skip
        ids = fit_prompt(tokenizer, messages, config.max_new_tokens, most).ids
        found.append(Question(messages, expected["content"], ids))
    require(bool(found), "questions.path", path, "it holds no conversation")
    return found


def find_questions(config: AskedConfig) -> str | None:
    """The file of `config.questions`; for "auto", that of the first source with one, or None."""
    if config.questions.path != "auto":
        return config.questions.path
    found = (Path(source.path) / QUESTIONS for source in config.data.sources)
    return next((str(path) for path in found if path.is_file()), None)


def answer_questions(
    model: Baichuan2, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int, progress: Progress
) -> list[AnsweredQuestion] | None:  # fmt: skip
    """Greedy answers; None if `progress` stops it. All processes call it and get the same. Calls with the same
    questions share one compiled program."""
    settings = Settings(
        max_new_tokens, temperature=0, top_k=0, top_p=1.0, repetition_penalty=1.0, vocab_size=tokenizer.vocab_size
    )
    prepared = engine.prepare(model)
    answers: list[AnsweredQuestion] = []
    for batch in _batches(questions):
        # Every batch has the same size and the longest prompt: one shape.
        longest = max(questions, key=lambda question: len(question.ids))
        filled = [*batch, *[longest] * (min(len(questions), AT_ONCE) - len(batch))]
        found = continue_prompts(prepared, [question.ids for question in filled], settings)
        for question, continuation in zip(batch, found, strict=False):
            ended = continuation.reason == "eos"
            text = tokenizer.decode(continuation.tokens[: -1 if ended else None])
            right = ended and text.strip() == question.expected.strip()
            said = AnsweredQuestion(question.messages, question.expected, text, ended, right, len(continuation.tokens))
            answers.append(said)
        if not progress(f"answer {len(answers)} of {len(questions)}"):
            return None
    return answers


def _batches(questions: Sequence[Question]) -> list[Sequence[Question]]:
    size = AT_ONCE if len(questions) <= AT_ONCE else AT_ONCE - 1  # with room for the longest
    return [questions[i : i + size] for i in range(0, len(questions), size)]


def make_examine(
    build: Callable[[Params], Baichuan2], tokenizer: Tokenizer, questions: Sequence[Question], config: QuestionsConfig,
    start: Start,
) -> Examine | None:  # fmt: skip
    """`Job.examine`: asks the model that `build` makes of the trained parameters. None without questions."""

    def examine(step: int, params: Params, progress: Progress) -> dict[str, float] | None:
        answers = answer_questions(build(params), tokenizer, questions, config.max_new_tokens, progress)
        if answers is None:
            return None
        report(answers, step, config, start)
        return summarize(answers)

    return examine if questions else None


def summarize(answers: Sequence[AnsweredQuestion]) -> dict[str, float]:
    """Metrics: shares of answers that end and that are right, mean length in tokens."""
    count = len(answers)
    return {
        "answers_ended": sum(a.ended for a in answers) / count,
        "answers_right": sum(a.right for a in answers) / count,
        "answer_tokens": sum(a.tokens for a in answers) / count,
    }


def report(answers: Sequence[AnsweredQuestion], step: int, config: QuestionsConfig, start: Start) -> None:
    """Prints the shares and the first answers, and writes all to the workdir."""
    values = summarize(answers)
    start.say(
        f"step {step}  answers: {values['answers_right']:.1%} right, {values['answers_ended']:.1%} end by themselves, "
        f"{values['answer_tokens']:.1f} tokens each"
    )
    for answer in answers[: config.show]:
        question = " ".join(str(answer.messages[-1]["content"]).split())
        start.say(f"--- {question}\n{answer.answer}" + ("" if answer.ended else " ..."))
    if jax.process_index() == 0:
        with start.expendable.attempt("answers"):
            write_records(start.workdir / FOLDER / f"step_{step}.jsonl", map(dataclasses.asdict, answers))


def read_answers(workdir: Path, step: int) -> list[dict[str, Any]]:
    """The records that `report` wrote at a step, if any."""
    path = workdir / FOLDER / f"step_{step}.jsonl"
    if not path.is_file():
        return []
    # Not splitlines: answers may contain Unicode line separators.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def compare(workdir: Path, first: int, last: int, config: QuestionsConfig, start: Start) -> None:
    """Prints the first answers of two steps in a table."""
    before, after = read_answers(workdir, first), read_answers(workdir, last)
    if not before or not after or first == last:
        return
    table = make_table("question", "expected", f"step {first}", f"step {last}", title="Answers")
    for old, new in list(zip(before, after, strict=False))[: config.show]:
        table.add_row(*map(Text, (old["messages"][-1]["content"], old["expected"], old["answer"], new["answer"])))
    start.console.print(table)
