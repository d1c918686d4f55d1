"""C-Eval's files, prompts and hidden answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bc2_jax.evaluate.task import Judged
from bc2_jax.evaluate.tasks.ceval import SUBJECTS, TEST, VAL, load
from tests.evaluate.tasks.files import sums, write, write_csv

HEADER = ["id", "question", "A", "B", "C", "D", "answer"]


def table(items, answers: bool = True):
    rows = [[n, question, *options, "ABCD"[gold]] for n, (question, options, gold) in enumerate(items)]
    return [HEADER, *rows] if answers else [row[:-1] for row in [HEADER, *rows]]


@pytest.fixture
def data(tmp_path):
    for subject in ("law", "logic"):
        dev = [[*row, "explanation" if n == 0 else "因为"] for n, row in enumerate(table(sums(5)))]
        write_csv(tmp_path / "ceval" / "dev" / f"{subject}_dev.csv", dev)
        write_csv(tmp_path / "ceval" / "val" / f"{subject}_val.csv", table(sums(3, 50)), "\r\n")
        write_csv(tmp_path / "ceval" / "test" / f"{subject}_test.csv", table(sums(2, 70), answers=False))
    return tmp_path


def test_the_prompt_is_the_official_one(data):
    loaded = VAL.load(data)
    assert [one.id for one in loaded.examples] == [f"{s}/{n}" for s in ("law", "logic") for n in range(3)]
    first = loaded.examples[0]
    assert (first.group, first.gold, first.choices, first.bare) == ("law", (2,), tuple("ABCD"), tuple("ABCD"))
    items = [f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n答案：" for q, (a, b, c, d), _ in sums(5)]
    # The official script: the header and a line end, then a line end before each shot and before the question.
    order = np.random.default_rng(123).permutation(5)
    shots = "".join("\n" + items[n] + "ABCD"[n % 4] for n in order)
    question = "\n50 加 3 等于多少？\nA. 51\nB. 52\nC. 53\nD. 54\n答案："
    assert list(order) == [4, 0, 2, 3, 1]
    assert first.prompt == "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n" + shots + question
    assert "Only 2 of 52 subjects of C-Eval are there" in loaded.notes[0]
    assert load(data, "val", only=["law"]).examples == loaded.examples[:3]
    assert load(data / "ceval", "val").examples == loaded.examples


def test_hidden_answers_are_submitted(data):
    examples = TEST.load(data).examples
    assert all(one.gold == () for one in examples)
    judged = [Judged(one, {}, "ABCD"[n % 4]) for n, one in enumerate(examples)]
    assert TEST.submission(judged) == {"law": {"0": "A", "1": "B"}, "logic": {"0": "C", "1": "D"}}
    assert TEST.summarize(judged) == {}
    # The column may be there and empty, as in the Hugging Face dataset.
    empty = [HEADER, *([*row, ""] for row in table(sums(2, 70), answers=False)[1:])]
    write_csv(data / "ceval" / "test" / "law_test.csv", empty)
    assert TEST.load(data).examples == examples


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("val/law_val.csv", table([*sums(1), ("", ("1", "2", "3", "4"), 0)]), "law_val.csv:3: 'question' is empty"),
        ("val/law_val.csv", [HEADER, [0, "q", 1, 2, 3, 4, "E"]], "law_val.csv:2: 'answer' is 'E'; it must be one of A"),
        ("val/law_val.csv", [HEADER, [0, "q", 1, 2, 3, 4, ""]], "law_val.csv:2: 'answer' is ''; it must be one of A"),
        ("val/law_val.csv", table(sums(2), answers=False), "law_val.csv:1: the header lacks 'answer'"),
        ("dev/law_dev.csv", [HEADER, [0, "q", 1, 2, 3, "A"]], "law_dev.csv:2: it has 6 columns instead of 7"),
        ("val/laws_val.csv", table(sums(2)), r"laws_val.csv is not called .* 52 subjects; did you mean law_val.csv\?"),
        ("dev/marxism_dev.csv", table(sums(2)), "val/marxism_val.csv is missing: it holds the questions"),
        ("val/marxism_val.csv", table(sums(2)), "dev/marxism_dev.csv is missing: it holds the shots"),
    ],
)
def test_what_is_wrong_is_named(data, path, content, said):
    write_csv(data / "ceval" / path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        VAL.load(data)


def test_fewer_shots_and_the_released_dataset_of_hugging_face(tmp_path):
    for split, count in (("dev", 3), ("val", 2)):
        rows = [dict(zip(HEADER, map(str, row), strict=True)) for row in table(sums(count))[1:]]
        path = write(tmp_path / "ceval-exam" / "law" / f"{split}-00000-of-00001.parquet", "")
        pq.write_table(pa.Table.from_pylist(rows), path)
    loaded = VAL.load(tmp_path)
    assert [len(one.shots) for one in loaded.examples] == [3, 3]
    assert loaded.examples[1].question.startswith("1 加 2 等于多少？\nA. 2\n")
    assert "3 shots instead of 5" in loaded.notes[-1]
    (tmp_path / "ceval-exam" / "law" / "dev-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"law/dev-00000-of-00001.parquet is missing"):
        VAL.load(tmp_path)


def test_all_subjects():
    assert len(SUBJECTS) == len(set(SUBJECTS.values())) == 52
