"""The demo's text from raw documents to batches."""

from pathlib import Path

import pytest

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.curate import demo
from bc2_jax.curate.demo import prepare_demo
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.demo_corpus import demo_documents
from bc2_jax.data.loader import make_train_loader, make_validation_batches


def test_prepare_demo_gives_a_loadable_corpus_and_caches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bc2_jax.data.demo_corpus._chapters", lambda _: None)
    english = demo_documents(tmp_path)["en"]
    monkeypatch.setattr(demo, "demo_documents", lambda _: {"en": english, "code": modules})
    settings = {"vocab_size": 700, "sequence_length": 64, "validation_fraction": 0.3}
    with caplog.at_level("INFO"):
        corpus = prepare_demo(tmp_path, **settings)
    assert "curation kept" in caplog.text and "copied paragraphs" in corpus.report.read_text()
    data = DataConfig(
        sources=tuple(SourceConfig(path=str(path)) for path in corpus.sources.values()),
        tokenizer=str(corpus.tokenizer),
        sequence_length=64,
        global_batch_size=4,
    )
    assert list(corpus.sources) == ["en", "code"]
    assert make_train_loader(data, process_index=0, process_count=1)[0]["labels"].shape == (4, 64)
    assert len(make_validation_batches(data, 4)) > 0
    # Many topics repeat others: curation drops them.
    assert 0 < sum(part.manifest.documents for part in list_parts(corpus.sources["en"])) < len(english) - 5

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare_demo(tmp_path, **settings) == corpus
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    other = prepare_demo(tmp_path, **(settings | {"sequence_length": 32}))
    assert other.tokenizer != corpus.tokenizer
    assert not list(tmp_path.glob(".*"))
