"""AGIEval's files: Chinese and English ones, and what is left out."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate.tasks.agieval import CHINESE, ENGLISH, OTHERS, TASK
from tests.evaluate.tasks.files import sums, write_lines


def row(n: int, **more) -> dict:
    [(text, values, gold)] = sums(1, n)
    options = [f"({letter}){value}" for letter, value in zip("ABCDE", values, strict=False)]
    return {"passage": None, "question": text, "options": options, "label": "ABCD"[gold], "answer": None, **more}


def test_single_choice_of_four_only(tmp_path):
    folder = tmp_path / "AGIEval" / "data" / "v1"
    five = row(10, options=[f"({letter})x" for letter in "ABCDE"], label="E")
    write_lines(folder / "gaokao-physics.jsonl", [*map(row, range(7)), row(8, label=["A", "D"]), row(9, label=["B"])])
    write_lines(folder / "sat-en.jsonl", [row(n, passage="A text.") for n in range(6)])
    write_lines(folder / "sat-math.jsonl", [row(1), row(2), five])
    write_lines(folder / "aqua-rat.jsonl", [five, five])
    write_lines(folder / "jec-qa-kd.jsonl", [row(1)])
    write_lines(folder / "math.jsonl", [row(1, options=None, label=None, answer="3")])
    write_lines(folder / "gaokao-mathqa.jsonl", [row(1), row(2), row(3, options=None, label=None)])
    loaded = TASK.load(tmp_path)
    assert loaded.left_out == {
        "five options": 3,
        "JEC-QA, where several answers may be right": 1,
        "no options": 2,
        "more than one right answer": 1,
        "used as shots": 5 + 5 + 1 + 1,
    }
    assert len(loaded.examples) == 3 + 1 + 1 + 1
    assert f"Only 4 of {len(CHINESE) + len(ENGLISH)} files" in loaded.notes[0]
    english = next(one for one in loaded.examples if one.group == "sat-en")
    number = int(english.id.rpartition("/")[2])
    assert english.header == "The following are multiple choice questions (with answers) about SAT English.\n\n"
    text, (a, b, c, d), gold = sums(1, number)[0]
    assert english.question == f"A text.\n{text}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    assert (english.choices, english.gold) == ((" A", " B", " C", " D"), (gold,))
    chinese = next(one for one in loaded.examples if one.group == "gaokao-physics")
    assert chinese.header.startswith("以下是中国关于高考物理考试的")
    assert chinese.shots[0].count("\n") == 6
    assert "答案：" in chinese.shots[0]


def test_the_first_version_comes_first(tmp_path):
    for version, count in (("v1_1", 4), ("v1", 3)):
        write_lines(tmp_path / "agieval" / "data" / version / "logiqa-zh.jsonl", map(row, range(count)))
    assert len(TASK.load(tmp_path).examples) == 1
    assert TASK.load(tmp_path).left_out == {"used as shots": 2}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"label": "E"}, "'label' is 'E'; it must be one of A, B, C, D"),
        ({"label": None}, "'label' is None; it must be one of A, B, C, D"),
        ({"label": 2}, "'label' is 2; it must be one of A, B"),
        ({"options": ["(A)1", 2, "(C)3", "(D)4"]}, "it must be a list of texts"),
        ({"question": ""}, "'question' is empty"),
    ],
)
def test_damaged_rows(tmp_path, more, said):
    write_lines(tmp_path / "agieval" / "logiqa-zh.jsonl", [row(0), row(1, **more)])
    with pytest.raises(ValueError, match=f"logiqa-zh.jsonl:2: .*{said}"):
        TASK.load(tmp_path)


def test_slips_of_the_release_are_left_out_and_named(tmp_path):
    """Lines with a single backslash before a letter, lost options and letters without brackets are in data/v1."""
    three = row(11, options=["(A)1", "(B)2", "(C)3"], label="D")
    unbracketed = [row(n, options=[f"{letter} {letter}{n}" for letter in "ABCD"]) for n in range(3)]
    path = write_lines(tmp_path / "agieval" / "data" / "v1" / "logiqa-zh.jsonl", [*unbracketed, three])
    path.write_text(path.read_text() + '{"question": "$\\mathrm{x}", "options": []}\n')
    loaded = TASK.load(tmp_path)
    assert loaded.left_out == {
        "neither four nor five options": 1,
        "used as shots": 2,
        "not JSON, as the benchmark released it": 1,
    }
    assert any(f"{path}:5: the line is not JSON" in note and note.endswith("it is left out.") for note in loaded.notes)
    number = loaded.examples[0].id[-1]
    assert f"\nA. A{number}\nB. B{number}\n" in loaded.examples[0].question


@pytest.mark.parametrize("options", [["A lot", "B", "C", "D"], ["(B)1", "(A)2", "(C)3", "(D)4"]])
def test_options_that_only_look_marked_stay(tmp_path, options):
    write_lines(tmp_path / "agieval" / "sat-en.jsonl", [row(n, options=options) for n in range(2)])
    assert f"\nA. {options[0]}\nB. {options[1]}\n" in TASK.load(tmp_path).examples[0].question


def test_every_file_of_the_benchmark_is_known():
    assert len(CHINESE | ENGLISH | OTHERS) == 21  # 20 tasks, of which JEC-QA is two
