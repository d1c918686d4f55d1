"""MMLU: 57 subjects in English."""

from __future__ import annotations

from pathlib import Path

from bc2_jax.evaluate.task import Task
from bc2_jax.evaluate.tasks.choices import MMLU, SHOTS, Item
from bc2_jax.evaluate.tasks.reading import Row, read_rows
from bc2_jax.evaluate.tasks.subjects import Subjects
from bc2_jax.validation import show

SUBJECTS: tuple[str, ...] = (
    *"""abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions""".split(),  # noqa: SIM905  # 57 quoted names would be a page
)


def _read(path: Path, subject: str) -> list[Item]:
    if path.suffix == ".csv":
        rows, read = read_rows(path, columns=("question", "A", "B", "C", "D", "answer")), _from_cells
    else:
        rows, read = read_rows(path, needed=("question", "choices", "answer")), _from_record
    return [Item(f"{subject}/{number}", row.filled("question"), *read(row)) for number, row in enumerate(rows)]


def _from_cells(row: Row) -> tuple[tuple[str, ...], int]:
    return tuple(map(row.text, "ABCD")), row.letter("answer", "ABCD")


def _from_record(row: Row) -> tuple[tuple[str, ...], int]:
    options, answer = row.values["choices"], row.values["answer"]
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(one, str) for one in options):
        raise ValueError(f"{row.where}: 'choices' is {show(options)}; it must be a list of four texts.")
    if isinstance(answer, str):
        return tuple(options), row.letter("answer", "ABCD")
    if answer not in range(4) or isinstance(answer, bool):
        raise ValueError(f"{row.where}: 'answer' is {show(answer)}; it must be 0, 1, 2 or 3.")
    return tuple(options), answer


def _name(subject: str) -> str:
    # The official script puts a space before each word, which makes two after "about".
    return "".join(f" {word}" for word in subject.split("_"))


BENCHMARK = Subjects(
    title="MMLU",
    names=("mmlu", "cais_mmlu", "hendrycks_test"),
    inner=("", "data", "mmlu"),
    shots=("dev", "*_dev.csv"),
    asked=("test", "*_test.csv"),
    subjects=SUBJECTS,
    source=(
        "dev/SUBJECT_dev.csv and test/SUBJECT_test.csv for each of 57 subjects, CSV without a header (question, four "
        "options, letter), as in data.tar of github.com/hendrycks/test; or SUBJECT/dev-*.parquet and "
        "SUBJECT/test-*.parquet (question, choices, answer from 0) of the Hugging Face dataset cais/mmlu; in "
        "DATA_DIR/mmlu."
    ),
    wording=MMLU,
    read=_read,
    name_subject=_name,
    prompt_limit=2048,
    others=True,
)
TASK = Task(
    name="mmlu",
    title="MMLU",
    source=BENCHMARK.source,
    kind="letters",
    shots=SHOTS,
    load=BENCHMARK.load,
    paper={"7B": 54.16, "13B": 59.17},
    paper_source="Table 1 and README, mean over items",
    notes=(
        "The official script keeps prompts within 2,048 tokens and drops the last shots until they fit.",
        "Baichuan-7B's script scores bare letters although its shots show them after a space; which of the two the "
        "paper used with Baichuan 2's tokenizer is not said.",
    ),
)
