"""C-Eval: 52 subjects in Chinese; its site keeps the answers of the test split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bc2_jax.evaluate.task import Judged, Loaded, Task, groups_first
from bc2_jax.evaluate.tasks.choices import CEVAL, SHOTS, Item
from bc2_jax.evaluate.tasks.reading import Row, read_rows
from bc2_jax.evaluate.tasks.subjects import Subjects

SUBJECTS = {
    "accountant": "注册会计师", "advanced_mathematics": "高等数学", "art_studies": "艺术学",
    "basic_medicine": "基础医学", "business_administration": "工商管理",
    "chinese_language_and_literature": "中国语言文学", "civil_servant": "公务员", "clinical_medicine": "临床医学",
    "college_chemistry": "大学化学", "college_economics": "大学经济学", "college_physics": "大学物理",
    "college_programming": "大学编程", "computer_architecture": "计算机组成", "computer_network": "计算机网络",
    "discrete_mathematics": "离散数学", "education_science": "教育学", "electrical_engineer": "注册电气工程师",
    "environmental_impact_assessment_engineer": "环境影响评价工程师", "fire_engineer": "注册消防工程师",
    "high_school_biology": "高中生物", "high_school_chemistry": "高中化学", "high_school_chinese": "高中语文",
    "high_school_geography": "高中地理", "high_school_history": "高中历史", "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理", "high_school_politics": "高中政治",
    "ideological_and_moral_cultivation": "思想道德修养与法律基础", "law": "法学",
    "legal_professional": "法律职业资格", "logic": "逻辑学",
    "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论概论", "marxism": "马克思主义基本原理",
    "metrology_engineer": "注册计量师", "middle_school_biology": "初中生物", "middle_school_chemistry": "初中化学",
    "middle_school_geography": "初中地理", "middle_school_history": "初中历史",
    "middle_school_mathematics": "初中数学", "middle_school_physics": "初中物理",
    "middle_school_politics": "初中政治", "modern_chinese_history": "近代史纲要", "operating_system": "操作系统",
    "physician": "医师资格", "plant_protection": "植物保护", "probability_and_statistics": "概率统计",
    "professional_tour_guide": "导游资格", "sports_science": "体育学", "tax_accountant": "税务师",
    "teacher_qualification": "教师资格", "urban_and_rural_planner": "注册城乡规划师", "veterinary_medicine": "兽医学",
}  # fmt: skip
_FIELDS = ("id", "question", "A", "B", "C", "D")


def _subjects(split: str) -> Subjects:
    return Subjects(
        title="C-Eval",
        names=("ceval", "ceval-exam", "formal_ceval"),
        inner=("", "data", "formal_ceval", "ceval-exam"),
        shots=("dev", "*_dev.csv"),
        asked=(split, f"*_{split}.csv"),
        subjects=SUBJECTS,
        source=(
            f"dev/SUBJECT_dev.csv and {split}/SUBJECT_{split}.csv for each of 52 subjects, CSV with the header "
            f"id,question,A,B,C,D{',answer' * (split != 'test')} (dev has answer,explanation too), as in "
            "ceval-exam.zip of the Hugging Face dataset ceval/ceval-exam, unpacked to DATA_DIR/ceval."
        ),
        wording=CEVAL,
        read=_read,
        name_subject=SUBJECTS.__getitem__,
        choose_shots=_shuffle,
    )


def load(data_dir: Path, split: str, only: Collection[str] | None = None) -> Loaded:
    """Items of `split` after the dev items of their subject."""
    return _subjects(split).load(data_dir, only)


def _shuffle(shots: list[Item]) -> list[Item]:
    # The official script's `Dataset.shuffle(seed=123)` is this permutation.
    return [shots[i] for i in np.random.default_rng(123).permutation(len(shots))[:SHOTS]]


def _read(path: Path, subject: str) -> list[Item]:
    # SUBJECT_test.csv, test/SUBJECT.jsonl or SUBJECT/test-00000-of-00001.parquet.
    is_test = path.stem.removeprefix(f"{subject}_").partition("-")[0] == "test"
    rows = read_rows(path, needed=_FIELDS if is_test else (*_FIELDS, "answer"))
    return [_item(row, subject, is_test) for row in rows]


def _item(row: Row, subject: str, is_test: bool) -> Item:
    options = tuple(row.text(letter) for letter in "ABCD")
    is_hidden = is_test and not str(row.values.get("answer") or "").strip()
    gold = None if is_hidden else row.letter("answer", "ABCD")
    return Item(f"{subject}/{str(row.values['id']).strip()}", row.filled("question"), options, gold)


def submission(judged: Sequence[Judged]) -> dict[str, dict[str, str]]:
    """Subject -> id -> letter: the JSON file that the benchmark's site takes."""
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for one in judged:
        subject, _, number = one.example.id.rpartition("/")
        answers[subject][number] = one.answer
    return dict(answers)


_ASKED = "The official script scores the letters without a space, as the shots show them: both ways agree."
VAL = Task(
    name="ceval",
    title="C-Eval (val)",
    source=_subjects("val").source,
    kind="letters",
    shots=SHOTS,
    load=partial(load, split="val"),
    paper={"7B": 54.00, "13B": 58.10},
    paper_source="Table 1 and README, on the test split, which its site scores",
    summarize=groups_first,
    notes=(
        "The paper's figures are for the test split, whose answers are not published; these are for val.",
        "The paper does not say whether its figure is the mean over subjects or over items; both are given.",
        _ASKED,
    ),
)
TEST = Task(
    name="ceval_test",
    title="C-Eval (test)",
    source=_subjects("test").source,
    kind="letters",
    shots=SHOTS,
    load=partial(load, split="test"),
    paper=VAL.paper,
    paper_source="Table 1 and README",
    summarize=groups_first,
    submission=submission,
    notes=("The site keeps the answers: predictions are written in its format, without an accuracy.", _ASKED),
)
