"""MMLU: 57 subjects in English."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import MMLU, Item, make_examples, too_few
from bc2_jax.evaluate.tasks.reading import Row, read_rows
from bc2_jax.evaluate.tasks.subjects import Layout
from bc2_jax.validation import show

SHOTS = 5
PROMPT_LIMIT = 2048
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
    security_studies sociology us_foreign_policy virology world_religions""".split(),  # noqa: SIM905
)
LAYOUT = Layout(
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
    others=True,
)


def load(data_dir: Path, only: Collection[str] | None = None) -> Loaded:
    """Items of test after the first five of dev; of all subjects there are, or of `only` some."""
    pairs, notes = LAYOUT.find(data_dir)
    notes += LAYOUT.missing(pairs, SUBJECTS if only is None else only)
    examples = []
    for subject in sorted(pairs if only is None else pairs.keys() & set(only)):
        dev, test = pairs[subject]
        shots, items = (_items(path, subject) for path in (dev, test))
        notes += too_few(shots, SHOTS, dev)
        # The official script spells a blank before each word, so that there are two after "about".
        name = "".join(f" {word}" for word in subject.split("_"))
        examples += make_examples(items, shots[:SHOTS], MMLU, name, subject, prompt_limit=PROMPT_LIMIT)
    return Loaded(examples, notes=tuple(notes))


def _items(path: Path, subject: str) -> list[Item]:
    if path.suffix == ".csv":
        rows = read_rows(path, columns=("question", "A", "B", "C", "D", "answer"))
        read = _from_cells
    else:
        rows = read_rows(path, needed=("question", "choices", "answer"))
        read = _from_record
    return [Item(f"{subject}/{number}", row.filled("question"), *read(row)) for number, row in enumerate(rows)]


def _from_cells(row: Row) -> tuple[tuple[str, ...], int]:
    return tuple(row.text(letter) for letter in "ABCD"), row.letter("answer", "ABCD")


def _from_record(row: Row) -> tuple[tuple[str, ...], int]:
    options, answer = row.values["choices"], row.values["answer"]
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(one, str) for one in options):
        raise ValueError(f"{row.where}: 'choices' is {show(options)}; it must be a list of four texts.")
    if isinstance(answer, str):
        return tuple(options), row.letter("answer", "ABCD")
    if answer not in range(4) or isinstance(answer, bool):
        raise ValueError(f"{row.where}: 'answer' is {show(answer)}; it must be 0, 1, 2 or 3.")
    return tuple(options), answer


TASK = Task(
    name="mmlu",
    title="MMLU",
    source=LAYOUT.source,
    kind="letters",
    shots=SHOTS,
    load=load,
    paper={"7B": 54.16, "13B": 59.17},
    paper_source="Table 1 and README, mean over items",
    notes=(
        "The official script keeps prompts within 2,048 tokens and drops the last shots until they fit.",
        "The script of Baichuan-7B scores bare letters though its shots show them after a blank; which of the two the "
        "paper used with the tokenizer of Baichuan 2 is not said.",
    ),
)
