"""MedQA's files with five options, in two languages; the version with four is refused."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.tasks.medqa import MCMLE, USMLE
from tests.evaluate.tasks.files import sums, write_lines


def row(n: int, count: int = 5, **more) -> dict:
    [(text, values, gold)] = sums(1, n)
    options = dict(zip("ABCDE"[:count], [*values, "none"], strict=False))
    letter = "ABCD"[gold]
    return {"question": text, "answer": options[letter], "options": options, "answer_idx": letter, **more}


@pytest.mark.parametrize(("task", "part"), [(USMLE, "US"), (MCMLE, "Mainland")])
def test_five_options(tmp_path, task, part):
    folder = tmp_path / "MedQA" / "data_clean" / "questions" / part
    write_lines(folder / "dev.jsonl", [*map(row, range(7)), row(9, 4)])
    last = row(23, answer="none", answer_idx="E")
    write_lines(folder / "test.jsonl", [row(20), row(21, 4), row(22, answer_idx=None), last])
    loaded = task.load(tmp_path)
    assert loaded.left_out == {"4 options instead of five": 1}
    assert loaded.notes == ()
    assert [one.gold for one in loaded.examples] == [(0,), (2,), (4,)]
    space, cue = (" ", "Answer:") if part == "US" else ("", "答案：")
    first = loaded.examples[0]
    assert first.question == f"20 加 1 等于多少？\nA. 21\nB. 22\nC. 23\nD. 24\nE. none\n{cue}"
    assert first.choices == tuple(space + letter for letter in "ABCDE")
    assert first.bare == tuple("ABCDE")
    assert len(first.shots) == 5
    assert all("\nE. none\n" in shot for shot in first.shots)
    # The Hugging Face dataset's way to spell options.
    spelt = [row(20) | {"options": [{"key": key, "value": value} for key, value in row(20)["options"].items()]}]
    write_lines(folder / "test.jsonl", spelt)
    assert task.load(folder.parent.parent).examples == [first]


def test_what_is_wrong_is_named(tmp_path):
    folder = tmp_path / "medqa" / "questions" / "US"
    write_lines(folder / "test.jsonl", [row(1), row(2)])
    with pytest.raises(FileNotFoundError, match=r"dev.jsonl is missing: it holds the shots; US/test.jsonl"):
        USMLE.load(tmp_path)
    write_lines(folder / "dev.jsonl", [row(1), row(2)])
    with pytest.raises(FileNotFoundError, match=r"Mainland/test.jsonl and Mainland/dev.jsonl"):
        MCMLE.load(tmp_path)
    assert "2 shots instead of 5" in USMLE.load(tmp_path).notes[0]
    for bad, said in (
        (row(2, answer_idx="F"), "'answer_idx' is 'F'; it must be one of A, B, C, D, E"),
        (row(2, answer_idx=None, answer="other"), "'answer' is 'other', which is not one of the options"),
        (row(2, question=""), "'question' is empty"),
        (row(2, options={"A": "x", "F": "y"}), "'options' is "),
    ):
        write_lines(folder / "test.jsonl", [row(1), bad])
        with pytest.raises(ValueError, match=f"test.jsonl:2: {said}"):
            USMLE.load(tmp_path)
    write_lines(folder / "test.jsonl", [row(1, 4), row(2, 4)])
    with pytest.raises(ValueError, match="holds no question with five options: 4 options instead of five"):
        USMLE.load(tmp_path)
