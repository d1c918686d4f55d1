"""The demo's conversations: what is read of a package, and tasks whose answers are checked by other means."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bc2_jax.align import demo
from bc2_jax.align.demo import make_tasks, read_dialogues
from bc2_jax.config import DistributedConfig, FineTuneConfig, MeshConfig
from bc2_jax.config.file import read_config_file
from bc2_jax.data.packing import load_manifest
from bc2_jax.data.pinned_package import Unreachable

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    "zh": ["却说玄德引军而行，天下大势。分久必合？云长曰：此言是也！"],
    "en": ["The name of a method is the first word of all\nAn attribute reference is a primary followed by a name"],
    "code": ["def first(numbers):\n    return numbers[0] + 1\n"],
}
DATA = """
conversations:
- - 你好
  - 你好，有什么可以帮你？
  - 谢谢
- - What is 2 + 2?
  - 4
- - What is 2 + 2?
  - 4
- - Tell me everything.
  - {long}
- - Nobody answers.
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheel = tmp_path / "fetched.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for language in ("chinese", "german"):
            archive.writestr(f"corpus/data/{language}/some.yml", DATA.format(long="x" * 500))
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


def test_dialogues_are_fetched_once_and_short_and_different(package, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fetch_wheel", lambda name, sha256, folder: package)
    found = read_dialogues(tmp_path / "cache")
    assert [[message["content"] for message in conversation] for conversation in found] == [
        ["你好", "你好，有什么可以帮你？"], ["What is 2 + 2?", "4"],
    ]  # fmt: skip
    assert {message["role"] for conversation in found for message in conversation[::2]} == {"user"}
    monkeypatch.setattr(demo, "fetch_wheel", None)
    assert read_dialogues(tmp_path / "cache") == found


def test_without_a_registry_there_are_none_and_another_file_is_refused(tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> Path:
        raise Unreachable("ERROR: No matching distribution found")

    monkeypatch.setattr(demo, "fetch_wheel", fail)
    assert read_dialogues(tmp_path) == []
    assert "pip can't fetch chatterbot-corpus==1.3.3: ERROR: No matching distribution" in caplog.text
    (tmp_path / "chatterbot_corpus.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"chatterbot_corpus.whl is not valid: its SHA-256 is"):
        read_dialogues(tmp_path)


def test_tasks_are_different_and_their_answers_right():
    tasks = make_tasks(DOCUMENTS, 900)
    assert tasks == make_tasks(DOCUMENTS, 900) != make_tasks(DOCUMENTS, 900, seed=1)
    questions = [question["content"] for question, _ in tasks]
    assert len(set(questions)) == len(questions) == 900
    checked = 0
    for question, answer in ((q["content"], a["content"]) for q, a in tasks):
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if "Which is larger" in question or "哪个大" in question:
            assert int(answer) == max(numbers)
        elif "Which number follows" in question or "后面是几" in question:
            assert int(answer) == numbers[0] + 1
        elif answer in ("odd", "even", "单数", "双数"):
            assert (answer in ("odd", "单数")) == (numbers[0] % 2 == 1)
        elif re.fullmatch(r"What is \d+ \+ \d\?|\d+ 加 \d 等于几？", question):
            assert int(answer) == sum(numbers)
        elif question.startswith("下文提到"):
            word, piece = question.removeprefix("下文提到").split("吗？")
            assert answer == ("提到了" if word in piece else "没有")
        elif found := re.fullmatch(r'Is the word "(\w+)" in this\? (.*)', question):
            assert answer == ("yes" if re.search(rf"\b{found[1]}\b", found[2]) else "no")
        else:
            continue
        checked += 1
    assert checked > 400
    assert {"Chinese", "中文", "English", "英文", "Python", "提到了", "没有", "yes", "no"} <= {
        a["content"] for _, a in tasks
    }


def test_conversations_are_packed_once_and_questions_are_tasks(tokenizer, tmp_path, monkeypatch):
    answer = {"role": "assistant", "content": "Hello."}
    dialogues = [[{"role": "user", "content": f"I am {i}."}, answer] for i in range(40)]
    monkeypatch.setattr(demo, "read_dialogues", lambda cache: dialogues)
    monkeypatch.setattr(demo, "demo_documents", lambda cache: DOCUMENTS)
    monkeypatch.setattr(demo, "_TASKS", 300)
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(tokenizer.path, base / "tokenizer.model")
    rows = demo.prepare_chat_demo(base, 128, tmp_path)
    assert [path.name for path in rows.sources] == ["dialogues", "tasks"]
    assert rows.tokenizer == base / "tokenizer.model"
    for path in rows.sources:
        manifest = load_manifest(path)
        assert manifest.kind == "chat" and manifest.sequence_length == 128 and manifest.validation.rows > 0
    tasks = {question["content"]: answer["content"] for question, answer in make_tasks(DOCUMENTS, 300)}
    asked = [json.loads(line)["messages"] for line in rows.questions.read_text(encoding="utf-8").splitlines()]
    assert asked and all(tasks[question["content"]] == answer["content"] for question, answer in asked)
    monkeypatch.setattr(demo, "prepare_chat", None)
    assert demo.prepare_chat_demo(base, 128, tmp_path) == rows


def test_the_demo_of_a_model_that_is_not_there_is_trained_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = read_config_file(ROOT / "configs" / "demo_chat.py", FineTuneConfig)
    commands: list[list[str]] = []

    def fail(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match="init_from = 'runs/demo' is not valid: its run ended with exit code 3"):
        file.prepare(file.config)
    assert commands[0][1:] == [
        str(ROOT / "train.py"), str(ROOT / "configs" / "demo.py"), "--workdir", "runs/demo", "--resume", "auto",
    ]  # fmt: skip
    several = DistributedConfig(coordinator_address="localhost:1", num_processes=2, process_id=0)
    with pytest.raises(ValueError, match="init_from = 'runs/demo' is not valid: it has no model; run python"):
        file.prepare(dataclasses.replace(file.config, distributed=several, mesh=MeshConfig(num_cpu_devices=1)))


def test_nothing_computes_before_the_mesh_is_made(tokenizer, tmp_path):
    """JAX that runs already can have neither the devices nor the processes of the run."""
    checkpoint = tmp_path / "runs" / "demo" / "checkpoints" / "1"
    (checkpoint / "params").mkdir(parents=True)
    (checkpoint / "_CHECKPOINT_METADATA").touch()
    shutil.copyfile(tokenizer.path, tmp_path / "runs" / "demo" / "tokenizer.model")
    program = f"""
import dataclasses
from bc2_jax.align import sft
from bc2_jax.config import TOKENIZER_OF_BASE, FineTuneConfig, SourceConfig
from bc2_jax.config.file import read_config_file
from jax._src import xla_bridge
file = read_config_file({str(ROOT / "configs" / "demo_chat.py")!r}, FineTuneConfig)
data = dataclasses.replace(file.config.data, sources=(SourceConfig(path="mine"),), tokenizer=TOKENIZER_OF_BASE)
config = sft.complete(file.prepare(dataclasses.replace(file.config, data=data)))
print(config.data.tokenizer, xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "runs/demo/tokenizer.model"), "False"], done.stderr
