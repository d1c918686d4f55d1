"""The adapter for lm-eval, against recorded numbers of lm-eval's own backend and against that backend itself."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _CACHE.name  # datasets writes its tables there

import pytest  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

import bc2_jax  # noqa: E402
from bc2_jax.align.chat import encode_prompt  # noqa: E402
from bc2_jax.cli import evaluate  # noqa: E402
from bc2_jax.convert.conversion import to_hf  # noqa: E402
from bc2_jax.evaluate import Scorer  # noqa: E402
from bc2_jax.evaluate.encoding import Request  # noqa: E402
from bc2_jax.evaluate.lm_eval import LmEvalModel, read_generation, run_lm_eval, tabulate, write_results  # noqa: E402
from bc2_jax.tokenizer import Tokenizer  # noqa: E402

EVALS = Path(__file__).parents[1] / "golden" / "evals"
GOLDEN = json.loads((EVALS / "golden.json").read_text("utf-8"))
TASKS = sorted(path.stem for path in (EVALS / "tasks").glob("*.yaml"))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(bc2_jax.load_pretrained(EVALS / "model"), Tokenizer(EVALS / "tokenizer" / "tokenizer.model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The tasks with the place of their data filled in."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in (EVALS / "tasks").glob("*.yaml"):
        (folder / path.name).write_text(path.read_text("utf-8").replace("DATA_DIR", str(EVALS / "data")), "utf-8")
    return folder


@pytest.fixture(scope="module")
def results(scorer, tasks) -> dict[str, Any]:
    return run_lm_eval(scorer, TASKS, include_path=tasks)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 1e-4 + 1e-5 * abs(expected)


@pytest.mark.parametrize("task", TASKS)
def test_figures_and_requests_are_those_of_lm_evals_backend(results, task):
    found = {name.split(",")[0]: value for name, value in results["results"][task].items()}
    for metric, expected in GOLDEN["results"][task].items():
        assert math.isclose(found[metric], expected, rel_tol=1e-4 if "perplexity" in metric else 2e-6), metric
    rows = []
    for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
        rows += [(sample["doc_id"], found[0]) for found in sample["resps"]]
    expected = GOLDEN["requests"][task]
    assert [doc for doc, _ in rows] == [row["doc"] for row in expected]
    for (_, answer), row in zip(rows, expected, strict=True):
        if task == "g_ppl":
            assert math.isclose(float(answer), row["loglikelihood"], rel_tol=2e-6)
        else:
            assert close(float(answer[0]), row["loglikelihood"]), row
            assert str(answer[1]) == str(row["is_greedy"]), row


def test_generations_are_those_of_lm_evals_backend(scorer):
    lines = [json.loads(line) for line in (EVALS / "data" / "gen.jsonl").read_text("utf-8").splitlines()]
    asked = [
        (line["prompt"], {"until": line["until"], "max_gen_toks": line["max_gen_toks"], "do_sample": False})
        for line in lines
    ]
    texts = LmEvalModel(scorer).generate_until(requests("generate_until", *asked))
    for text, expected in zip(texts, GOLDEN["generations"], strict=True):
        # The bytes of a character of which only a part was generated are decoded in more than one way.
        broken = "\ufffd" in expected["text"]
        assert text == (scorer.tokenizer.decode(expected["token_ids"]) if broken else expected["text"])
    pairs = [(prompt, row["text"]) for (prompt, _), row in zip(asked, GOLDEN["generations"], strict=True)]
    scores = LmEvalModel(scorer).loglikelihood(requests("loglikelihood", *[pair for pair in pairs if pair[1]]))
    for (log_prob, is_greedy), row in zip(scores, GOLDEN["scored_generations"], strict=True):
        assert close(log_prob, row["loglikelihood"]) and is_greedy == row["is_greedy"]


PAIRS = [
    ("诸葛亮", "曰：“吾有一计。”"), ("The function returns ", "a list of strings"), ("The function returns", " a list"),
    ("", "却说"), ("import os\n\n\n", "class Reader:"), ("第一回 " * 120, "宴桃园三结义"), ("for i in range(", "10):"),
    ("What does it do?\nA. open\nB. close\nAnswer:", " B"), ("What does it do?\nA. open\nB. close\nAnswer:", " A"),
]  # fmt: skip
TEXTS = [
    "却说玄德引军前进。" * 60,
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "λ 🀄\t\t中",
]
PROMPTS = [
    ("却说孔明", {"until": ["。", "\n"], "max_gen_toks": 20}),
    ("def write(", {"until": "\n\n", "max_gen_toks": 24}),
    ("The value of " * 90, {"until": [], "max_gen_toks": 12}),
]


def test_as_lm_evals_backend_on_the_llama_layout(scorer, tmp_path):
    """Of the folder that tools/convert.py writes."""
    from lm_eval.models.huggingface import HFLM

    shutil.copytree(EVALS / "model", tmp_path / "ours")
    shutil.copy(EVALS / "tokenizer" / "tokenizer.model", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "llama", dtype="float32", layout="llama")
    # transformers has even greedy requests obey its repetition_penalty.
    (tmp_path / "llama" / "generation_config.json").unlink(missing_ok=True)
    theirs = HFLM(pretrained=str(tmp_path / "llama"), dtype="float32", batch_size=1, device="cpu", add_bos_token=False)
    ours = LmEvalModel(scorer)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (
        theirs.max_length, theirs.prefix_token_id, theirs.eot_token_id
    )  # fmt: skip
    asked = requests("loglikelihood", *PAIRS)
    for found, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert close(found[0], expected[0]) and found[1] == expected[1]
    asked = requests("loglikelihood_rolling", *[(text,) for text in TEXTS])
    for found, expected in zip(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), strict=True):
        assert math.isclose(found, expected, rel_tol=2e-6)
    asked = requests("generate_until", *PROMPTS)
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_stride_is_lm_evals_context_of_its_windows(scorer):
    text = json.loads((EVALS / "data" / "ppl.jsonl").read_text("utf-8").splitlines()[4])["text"]
    ids = scorer.tokenizer.encode(text)
    windows = get_rolling_token_windows(ids, scorer.prefix_id, 256, context_len=256 - 100 + 1)
    requests = [Request(*pair) for pair in map(make_disjoint_window, windows)]
    assert len(requests) == 1 + -(-(len(ids) - 256) // 100)
    expected = sum(score.log_prob for score in scorer.score(requests))
    assert math.isclose(scorer.rolling([text], stride=100)[0], expected, rel_tol=1e-6)


def test_chat_is_asked_with_the_ids_of_a_chat_model(scorer):
    model = LmEvalModel(scorer)
    history = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "曹操 <reserved_107>"}]
    text = model.apply_chat_template(history)
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "曰："}], add_generation_prompt=False)
    ids = encode_prompt(scorer.tokenizer, history, 0, 256)
    pairs = [(text, "吾"), (begun, "吾")]
    tail = scorer.encode_pair("曰：", "吾")
    alone = [Request(ids, scorer.tokenizer.encode("吾")), Request([*ids, *tail.context], tail.continuation)]
    found = model.loglikelihood(requests("loglikelihood", *pairs))
    assert found == [(score.log_prob, score.is_greedy) for score in scorer.score(alone)]
    (answer,) = model.generate_until(requests("generate_until", (text, {"until": ["。"], "max_gen_toks": 8})))
    assert answer == scorer.generate([(ids, ["。"], 8)])[0]
    with pytest.raises(ValueError, match="spells the mark of a role"):
        model.apply_chat_template([
            {"role": "system", "content": "简短。"}, {"role": "user", "content": "曹操 "},
            {"role": "assistant", "content": ""},
        ])  # fmt: skip


def test_a_cache_is_of_one_model(scorer, tasks, tmp_path):
    def run(identity: str) -> tuple[dict[str, Any], int]:
        before = scorer.stats.requests
        found = run_lm_eval(scorer, ["g_cloze"], include_path=tasks, cache=tmp_path / "cache", identity=identity)
        return found["results"]["g_cloze"], scorer.stats.requests - before

    first, asked = run("step 1")
    assert asked == 24
    assert run("step 1") == (first, 0)
    assert run("step 2") == (first, 24)
    with pytest.raises(ValueError, match="identity = '' is not valid"):
        run("")


def test_the_program(tasks, tmp_path, capsys):
    """A second call finds the answers of the first."""
    shutil.copytree(EVALS / "model", tmp_path / "model")
    shutil.copy(EVALS / "tokenizer" / "tokenizer.model", tmp_path / "model")
    options = ["--lm-eval", "g_cloze", "--include-path", str(tasks), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert evaluate.main([str(tmp_path / "model"), *options]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "out" / "lm_eval" / "cache").iterdir())) == 1
    written = json.loads((tmp_path / "out" / "lm_eval" / "results.json").read_text("utf-8"))
    found = {name.split(",")[0]: value for name, value in written["results"]["g_cloze"].items()}
    assert found.items() >= GOLDEN["results"]["g_cloze"].items()
    assert written["config"]["model"] == str(tmp_path / "model")


def test_results_are_written_and_shown(results, tmp_path):
    paths = write_results(results, tmp_path / "out")
    assert [path.name for path in paths] == ["results.json", *(f"samples_{task}.jsonl" for task in results["samples"])]
    assert json.loads(paths[0].read_text("utf-8"))["results"]["g_ppl"] == results["results"]["g_ppl"]
    assert "g_zh_option" in tabulate(results) and "0.4500" in tabulate(results)


def test_settings_of_generation():
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    assert read_generation({}) == ([], 256, greedy)
    given = {"until": ["", "\n"], "max_new_tokens": 9, "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}
    assert read_generation(given) == (["\n"], 7, greedy)
    found = read_generation({"until": "a", "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1})
    assert found == (["a"], 256, {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1})
    with pytest.raises(ValueError, match="we do not have num_beams; legal are until"):
        read_generation({"num_beams": 4})
    with pytest.raises(ValueError, match="temperature = 0.0 is not valid: with do_sample it must be above 0"):
        read_generation({"do_sample": True, "temperature": 0.0})


def test_what_is_not_there_is_said(scorer, tasks, tmp_path, monkeypatch):
    class OnlyThese(TaskManager):
        """Without lm-eval's own tasks, whose thousands of files take long to look at."""

        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", OnlyThese)
    with pytest.raises(ValueError, match="no task 'g_clozes' among its own and below .*; did you mean 'g_cloze'"):
        run_lm_eval(lambda: pytest.fail("the model is loaded"), ["g_clozes"], include_path=tasks)
    with pytest.raises(ValueError, match="include_path = .* is not valid: there is no such folder"):
        run_lm_eval(scorer, ["g_cloze"], include_path=tmp_path / "none")
    (tmp_path / "a.yaml").write_text((EVALS / "tasks" / "g_ppl.yaml").read_text("utf-8"), "utf-8")
    with pytest.raises(ValueError, match="the data of g_ppl can't be read .*DATA_DIR"):
        run_lm_eval(scorer, ["g_ppl"], include_path=tmp_path)
