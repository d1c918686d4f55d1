"""Parts of the pipeline that are off by default: keywords, personal data, features and scores by one of our models."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.parquet as pq
import pytest
from flax import nnx

from bc2_jax.cli.train_quality import main as train_quality
from bc2_jax.config import ModelConfig
from bc2_jax.convert.pretrained import save_params
from bc2_jax.curate.config import CurationConfig, DenseConfig, QualityConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.features import EmbeddingConfig
from bc2_jax.curate.pipeline import curate
from bc2_jax.curate.privacy import PrivacyConfig
from bc2_jax.curate.safety import KeywordFile, SafetyConfig
from bc2_jax.model.baichuan import Baichuan2

ENGINE = Engine("native")
TEXTS = [topics[name] for name in sorted(topics) if len(topics[name]) > 2000]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def run(raw: str, out: Path, config: CurationConfig) -> tuple[dict, list[dict], list[dict]]:
    report = curate([raw], str(out), config, ENGINE, lambda *_: None)
    rows = [
        [row for file in sorted((out / name).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        for name in ("documents", "removed")
    ]
    return report, *rows


def test_keywords_and_personal_data(tmp_path):
    (tmp_path / "words.txt").write_text("forbidden phrase\n")
    texts = [
        f"{topics['formatstrings']}\n\nHere is the forbidden phrase again.",
        f"{topics['debugger']}\n\nWrite to someone@example.org today.",
    ]
    raw = write(tmp_path / "raw.jsonl", texts)
    words = KeywordFile(category="test", path=str(tmp_path / "words.txt"))
    config = CurationConfig(privacy=PrivacyConfig(enabled=True), safety=SafetyConfig(keywords=(words,)))
    report, written, removed = run(raw, tmp_path / "out", config)
    assert [(row["id"], row["stage"], row["reason"]) for row in removed] == [("d0", "safety", "test: forbidden phrase")]
    assert [row["id"] for row in written] == ["d1"] and written[0]["text"].endswith("Write to <email> today.")
    assert report["changes"]["masked: email"] == 1
    (audit,) = (tmp_path / "out" / "work" / "filter" / "audit").glob("*.parquet")
    (finding,) = pq.read_table(audit).to_pylist()
    assert finding["category"] == "test" and "the forbidden phrase again" in finding["excerpt"]

    kept = run(raw, tmp_path / "kept", CurationConfig(safety=SafetyConfig(keywords=(words,), action="report")))
    assert [row["id"] for row in kept[1]] == ["d0", "d1"] and kept[1][1]["text"].endswith("someone@example.org today.")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=tokenizer.vocab_size, position_embedding="alibi",
    )  # fmt: skip
    params = nnx.to_pure_dict(nnx.split(Baichuan2(config, rngs=nnx.Rngs(0)))[1])
    path = tmp_path_factory.mktemp("model") / "model"
    save_params(params, config, path, tokenizer.path)
    return path


def test_hidden_states_and_perplexity_of_our_own_model(tmp_path, model):
    copy = TEXTS[5].replace("the", "this", 3)
    raw = write(tmp_path / "raw.jsonl", [*TEXTS[:20], copy])
    good = write(tmp_path / "good.jsonl", [text[:1500] for text in TEXTS])
    bad = write(tmp_path / "bad.jsonl", [text[:1500][::-1] for text in TEXTS])
    scorer = tmp_path / "quality.npz"
    options = ["--language-model", str(model), "--max-tokens", "64", "--out", str(scorer)]
    assert train_quality(["--good", good, "--bad", bad, *options]) == 0
    config = CurationConfig(
        quality=QualityConfig(model=str(scorer), language_model=str(model), max_tokens=64),
        embedding=EmbeddingConfig(model=str(model), max_tokens=64),
        dense=DenseConfig(cosine=0.99),
    )
    report, written, removed = run(raw, tmp_path / "out", config)
    assert len(written) + len(removed) == 21 and written
    by_id = {row["id"]: row for row in removed}
    assert by_id["d20"]["kept"] == "d5"
    assert len({row["score"] for row in written}) > 5 and report["clusters"][0]["documents"] > 0
