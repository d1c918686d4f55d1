"""lm-eval's own client of OpenAI's API through our server: its figures are those of the library's scorer."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("HF_HOME", _CACHE.name)  # datasets writes its tables there
os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval  # noqa: E402  # it reads HF_HOME
import pytest  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import bc2_jax  # noqa: E402
from bc2_jax.evaluate import Scorer  # noqa: E402
from bc2_jax.evaluate.lm_eval import run_lm_eval  # noqa: E402
from bc2_jax.serve.loading import ServeOptions, describe_model, make_service  # noqa: E402
from bc2_jax.tokenizer import Tokenizer  # noqa: E402
from tests.serve.conftest import running  # noqa: E402

EVALS = Path(__file__).parents[1] / "golden" / "evals"
TASKS = ("g_cloze", "g_en_letter", "g_ppl")
GENERATION = """task: g_gen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: ""
generation_kwargs: {{until: ["。", "\\n"], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "golden"
    shutil.copytree(EVALS / "model", path)
    shutil.copy(EVALS / "tokenizer" / "tokenizer.model", path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The tasks with the place of their data filled in, and one that generates."""
    found = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        text = (EVALS / "tasks" / f"{name}.yaml").read_text("utf-8")
        (found / f"{name}.yaml").write_text(text.replace("DATA_DIR", str(EVALS / "data")), "utf-8")
    (found / "g_gen.yaml").write_text(GENERATION.format(data=EVALS / "data" / "gen.jsonl"), "utf-8")
    return found


@pytest.fixture(scope="module")
def expected(folder, tasks) -> dict[str, Any]:
    """Of windows as long as that client makes them: of `max_length` it takes off a token for the answer and one for
    the context."""
    model, tokenizer = bc2_jax.load_pretrained(folder), Tokenizer(folder / "tokenizer.model")
    found = run_lm_eval(Scorer(model, tokenizer), [*TASKS[:-1], "g_gen"], include_path=tasks)
    length = model.config.model_max_length - 2
    rolled = run_lm_eval(Scorer(model, tokenizer, max_length=length), TASKS[-1:], include_path=tasks)
    return {name: found[name] | rolled[name] for name in ("results", "samples")}


@pytest.fixture(scope="module")
def found(folder, tasks) -> dict[str, Any]:
    """As in docs/serving.md; the prefix of a text without a context is the library's."""
    options = ServeOptions(folder, slots=8, dtype="float32")
    model = describe_model(options)
    service = make_service(options, model.length)
    service.start()
    with running(model, service) as server:
        arguments = {
            "model": "golden", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote",
            "tokenized_requests": True, "num_concurrent": 8, "max_length": model.length, "custom_prefix_token_id": 1,
        }  # fmt: skip
        results = lm_eval.simple_evaluate(
            model="local-completions", model_args=arguments, tasks=[*TASKS, "g_gen"], bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )  # fmt: skip
    stats = service.stats()
    service.stop()
    assert stats.compilations == 0 and set(stats.requests) <= {"length", "eos", "cancelled"}
    return results


def answers(results: dict[str, Any], task: str) -> list[Any]:
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    return [answer for row in rows for answers in row["resps"] for answer in answers]


@pytest.mark.parametrize("task", TASKS)
def test_scores(found, expected, task):
    """Each request's, and the figures made of them."""
    ours, theirs = answers(expected, task), answers(found, task)
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        if task == "g_ppl":
            assert math.isclose(float(one), float(other), rel_tol=1e-5)
        else:
            assert math.isclose(float(one[0]), float(other[0]), rel_tol=1e-5, abs_tol=1e-4)
            assert str(one[1]) == str(other[1])
    figures = {name: value for name, value in expected["results"][task].items() if isinstance(value, float)}
    for name, value in figures.items():
        if "stderr" not in name:
            assert math.isclose(found["results"][task][name], value, rel_tol=1e-4), name


def test_generations(found, expected):
    """Greedy, up to a stop text."""
    ours, theirs = answers(expected, "g_gen"), answers(found, "g_gen")
    assert ours == theirs and len(set(map(json.dumps, theirs))) > 3
