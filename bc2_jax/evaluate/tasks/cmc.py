"""CMC, "CEval-MMLU-CMMLU": the 17 medical subjects of C-Eval (val), MMLU and CMMLU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.evaluate.task import Judged, Loaded, Metric, Task, by_group, mean_of_groups, mean_of_metrics
from bc2_jax.evaluate.tasks import ceval, cmmlu, mmlu

CEVAL_SUBJECTS = ("clinical_medicine", "basic_medicine")
MMLU_SUBJECTS = (
    "clinical_knowledge", "anatomy", "college_medicine", "college_biology", "nutrition", "virology",
    "medical_genetics", "professional_medicine",
)  # fmt: skip
CMMLU_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_medicine", "genetics", "nutrition", "traditional_chinese_medicine",
    "virology",
)  # fmt: skip


def load(data_dir: Path) -> Loaded:
    """The examples of the three benchmarks; their groups are BENCHMARK/SUBJECT."""
    parts = {
        "ceval": ceval.load(data_dir, "val", CEVAL_SUBJECTS),
        "mmlu": mmlu.BENCHMARK.load(data_dir, MMLU_SUBJECTS),
        "cmmlu": cmmlu.BENCHMARK.load(data_dir, CMMLU_SUBJECTS),
    }
    examples = [
        dataclasses.replace(example, id=f"{name}/{example.id}", group=f"{name}/{example.group}")
        for name, part in parts.items()
        for example in part.examples
    ]
    return Loaded(examples, notes=tuple(note for part in parts.values() for note in part.notes))


def summarize(judged: Sequence[Judged]) -> dict[str, Metric]:
    """For each way of scoring: the mean over subjects, and the mean over benchmarks of their means over subjects."""
    metrics = {}
    for way in judged[0].right if judged else ():
        groups = by_group(judged, way)
        metrics[f"{way}, mean of subjects"] = mean_of_groups(groups)
        benchmarks = sorted({group.partition("/")[0] for group in groups})
        means = [
            mean_of_groups({group: right for group, right in groups.items() if group.startswith(f"{name}/")})
            for name in benchmarks
        ]
        metrics[f"{way}, mean of benchmarks"] = mean_of_metrics(means)
    return metrics


TASK = Task(
    name="cmc",
    title="CMC (medical subjects of C-Eval, MMLU and CMMLU)",
    source="the files of ceval, mmlu and cmmlu in DATA_DIR.",
    kind="letters",
    shots=5,
    load=load,
    paper={"7B": 56.39, "13B": 59.33},
    paper_source="README (law and medicine)",
    summarize=summarize,
    notes=(
        "The paper does not say whether its figure is the mean of 17 subjects or of 3 benchmarks; both are given.",
        "The paper lists these subjects under the name MedMCQA. C-Eval's questions are from val.",
    ),
)
