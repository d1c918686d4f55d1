"""CMMLU's files, its prompt, and its rule for prompts that are too long."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.task import fit_shots
from bc2_jax.evaluate.tasks.cmmlu import SUBJECTS, TASK
from tests.evaluate.tasks.files import sums, write_csv

HEADER = ["", "Question", "A", "B", "C", "D", "Answer"]


def table(items):
    return [HEADER, *([n, question, *options, "ABCD"[gold]] for n, (question, options, gold) in enumerate(items))]


@pytest.fixture
def data(tmp_path):
    write_csv(tmp_path / "cmmlu" / "dev" / "agronomy.csv", table(sums(5, 8)))
    write_csv(tmp_path / "cmmlu" / "test" / "agronomy.csv", table(sums(2, 50)))
    return tmp_path


def test_the_prompt_is_the_official_one(data):
    loaded = TASK.load(data)
    shots = "".join(f"题目：{n} 加 {n % 4 + 1} 等于多少？\nA. {n + 1}\nB. {n + 2}\nC. {n + 3}\nD. {n + 4}\n答案是：{'ABCD'[n % 4]}\n\n" for n in range(8, 13))  # fmt: skip  # noqa: E501
    question = "题目：50 加 3 等于多少？\nA. 51\nB. 52\nC. 53\nD. 54\n答案是："
    first = loaded.examples[0]
    assert first.prompt == "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n" + shots + question
    assert (first.choices, first.bare, first.gold) == (tuple("ABCD"), tuple("ABCD"), (2,))
    assert TASK.load(data / "cmmlu") == loaded


def test_all_shots_of_the_longest_length_go_and_even_the_header(data):
    asked = TASK.load(data).examples[0]
    longest = max(map(len, asked.shots))
    kept = [shot for shot in asked.shots if len(shot) < longest]
    assert 1 < len(asked.shots) - len(kept) < 5
    fitted = fit_shots(asked, len(asked.prompt) - 1, len)
    assert fitted.text == asked.header + "".join(kept) + asked.question
    assert fit_shots(asked, len(asked.question), len) == (asked.question, 5, True, True)


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("test/agronomy.csv", table(sums(2))[1:], "agronomy.csv:1: the header lacks 'Question'"),
        ("test/agronomy.csv", [HEADER, [0, "q", 1, 2, 3, 4, "AB"]], "agronomy.csv:2: 'Answer' is 'AB'"),
        ("test/agronomy_test.csv", table(sums(2)), r"is not called \*.csv .* 67 subjects; did you mean agronomy.csv"),
        ("dev/arts.csv", table(sums(2)), "test/arts.csv is missing"),
    ],
)
def test_what_is_wrong_is_named(data, path, content, said):
    write_csv(data / "cmmlu" / path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        TASK.load(data)


def test_all_subjects():
    assert len(SUBJECTS) == len(set(SUBJECTS.values())) == 67
