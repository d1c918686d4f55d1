"""MMLU's files, with and without a header, and its prompt."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bc2_jax.evaluate.task import fit_shots
from bc2_jax.evaluate.tasks.mmlu import SUBJECTS, TASK
from tests.evaluate.tasks.files import sums, write, write_csv, write_lines

ANSWERS = "ABCD"


def rows(items):
    return [[question, *options, ANSWERS[gold]] for question, options, gold in items]


@pytest.fixture
def data(tmp_path):
    write_csv(tmp_path / "mmlu" / "data" / "dev" / "abstract_algebra_dev.csv", rows(sums(6)))
    write_csv(tmp_path / "mmlu" / "data" / "test" / "abstract_algebra_test.csv", rows(sums(3, 20)))
    return tmp_path


def test_the_prompt_is_the_official_one(data):
    loaded = TASK.load(data)
    shots = "".join(f"{n} 加 {n % 4 + 1} 等于多少？\nA. {n + 1}\nB. {n + 2}\nC. {n + 3}\nD. {n + 4}\nAnswer: {ANSWERS[n % 4]}\n\n" for n in range(5))  # fmt: skip  # noqa: E501
    header = "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
    question = "20 加 1 等于多少？\nA. 21\nB. 22\nC. 23\nD. 24\nAnswer:"
    first = loaded.examples[0]
    assert first.prompt == header + shots + question
    assert (first.choices, first.bare, first.gold) == ((" A", " B", " C", " D"), tuple("ABCD"), (0,))
    assert "Only 1 of 57 subjects of MMLU are there" in loaded.notes[0]
    # As the official script, whose limit is 2,048 tokens: the last shots go.
    fitted = fit_shots(first, 4096, lambda text: 10 * len(text))
    assert fitted.text == header + "".join(first.shots[: 5 - fitted.dropped]) + question
    assert 0 < fitted.dropped < 5


def test_the_dataset_of_hugging_face_is_the_same(data, tmp_path):
    there = TASK.load(data)
    records = [
        [{"question": question, "subject": "abstract_algebra", "choices": list(options), "answer": gold}
         for question, options, gold in items] for items in (sums(6), sums(3, 20))
    ]  # fmt: skip
    folder = tmp_path / "hub" / "mmlu" / "abstract_algebra"
    path = write(folder / "dev-00000-of-00001.parquet", "")
    pq.write_table(pa.Table.from_pylist(records[0]), path)
    write_lines(folder / "test.jsonl", records[1])
    write(folder.parent / "all" / "test-00000-of-00001.parquet", "")
    assert TASK.load(tmp_path / "hub") == there
    for key, value, said in (
        ("answer", 4, "'answer' is 4; it must be 0, 1, 2 or 3"),
        ("answer", "F", "'answer' is 'F'; it must be one of A, B, C, D"),
        ("choices", ["1", "2", "3"], "it must be a list of four texts"),
        ("question", " ", "'question' is empty"),
    ):
        write_lines(folder / "test.jsonl", [records[1][0], records[1][1] | {key: value}])
        with pytest.raises(ValueError, match=rf"test.jsonl:2: .*{said}"):
            TASK.load(tmp_path / "hub")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["q", 1, 2, 3, "A"], "test.csv:2: it has 5 columns instead of 6"),
        (["q", 1, 2, 3, 4, 5, "A"], "test.csv:2: it has 7 columns instead of 6"),
        (["q", 1, 2, 3, 4, "E"], "test.csv:2: 'answer' is 'E'"),
        (["", 1, 2, 3, 4, "A"], "test.csv:2: 'question' is empty"),
    ],
)
def test_damaged_rows(data, row, said):
    write_csv(data / "mmlu" / "data" / "test" / "abstract_algebra_test.csv", [*rows(sums(1)), row])
    with pytest.raises(ValueError, match=said):
        TASK.load(data)


def test_renamed_files(data):
    folder = data / "mmlu" / "data" / "test"
    (folder / "abstract_algebra_test.csv").rename(folder / "abstract-algebra_test.csv")
    with pytest.raises(
        FileNotFoundError, match="abstract_algebra_dev.csv is missing|abstract-algebra_dev.csv is missing"
    ):
        TASK.load(data)
    (data / "mmlu" / "data" / "dev" / "abstract_algebra_dev.csv").rename(
        data / "mmlu" / "data" / "dev" / "abstract-algebra_dev.csv"
    )
    assert "MMLU has no subject abstract-algebra, which is asked too" in TASK.load(data).notes[0]
    (folder / "abstract-algebra_test.csv").rename(folder / "abstract_algebra.csv")
    with pytest.raises(FileNotFoundError, match="expected files"):
        TASK.load(data)


def test_all_subjects():
    assert len(set(SUBJECTS)) == 57
