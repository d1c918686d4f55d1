"""Whose results a folder may take."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from bc2_jax.evaluate import asking
from bc2_jax.evaluate.asking import read_questions
from bc2_jax.evaluate.identity import Model, claim, read_identity, settle
from tests.evaluate import golden
from tests.evaluate.fakes import letters, task_of


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.setattr(asking, "find_task", lambda name: task_of(letters(9), name=name))
    return lambda *names, **settings: read_questions(names, tmp_path, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(golden.EVALS / "model", folder)
    shutil.copy(golden.EVALS / "tokenizer" / "tokenizer.model", folder)
    return Model(folder, dtype="float32")


def add_record(folder):
    (folder / "quiz").mkdir(parents=True, exist_ok=True)
    (folder / "quiz" / "records.jsonl").write_text("")


def test_a_folder_is_of_one_model_and_one_set_of_prompts(model, asked, tmp_path):
    out, about = tmp_path / "out", model.describe()
    assert (about["step"], about["dtype"], about["max_length"]) == (None, "float32", 256)
    assert claim(out, about, asked("quiz"))
    settle(out, about, "0123")
    add_record(out)
    assert claim(out, about, asked("quiz", "other")) and claim(out, about, asked("quiz", limit=3))
    assert set(read_identity(out)["tasks"]) == {"quiz", "other"} and read_identity(out)["checksum"] == "0123"
    before = (out / "evaluation.json").read_bytes()
    for change, message in (
        ({"dtype": "bfloat16"}, "another dtype .dtype float32, now bfloat16.: choose another --out"),
        ({"max_length": 64}, "another max_length"), ({"tokenizer_sha256": "x"}, "another tokenizer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            claim(out, about | change, asked("quiz"))
    with pytest.raises(ValueError, match="records of other prompts of quiz .2 shots, now 1.: choose"):
        claim(out, about, asked("third", "quiz", shots=1))
    assert (out / "evaluation.json").read_bytes() == before


def test_the_parameters_count_not_the_place_of_their_files(model, asked, tmp_path):
    out, about = tmp_path / "out", model.describe()
    claim(out, about, asked("quiz"))
    settle(out, about, "0123")
    add_record(out)
    moved = about | {"files": "others", "model": "/elsewhere"}
    assert not claim(out, moved, asked("quiz"))
    with pytest.raises(ValueError, match="results of another model .*checksum 0123; now /elsewhere, 4567"):
        settle(out, moved, "4567")
    settle(out, moved, "0123")
    assert claim(out, moved, asked("quiz"))
    # Killed before the first record: nothing is lost to another model.
    shutil.rmtree(out / "quiz")
    assert claim(out, about | {"files": "x", "dtype": "bfloat16"}, asked("quiz", shots=1))


def test_a_length_is_positive(model):
    with pytest.raises(ValueError, match="max_length = 0 is not valid"):
        dataclasses.replace(model, max_length=0)


def test_records_of_no_known_model_are_not_added_to(model, asked, tmp_path):
    add_record(tmp_path)
    with pytest.raises(ValueError, match="records but no evaluation.json"):
        claim(tmp_path, model.describe(), asked("quiz"))
    whole = {**model.describe(), "checksum": None, "tasks": {"quiz": {"shots": 2, "prompts_sha256": "x"}}}
    damaged = [{key: value for key, value in whole.items() if key != gone} for gone in ("checksum", "tasks", "dtype")]
    for about in (*damaged, [1], 3, whole | {"tasks": []}, whole | {"tasks": {"quiz": {"shots": 2}}}):
        (tmp_path / "evaluation.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match="evaluation.json is damaged"):
            claim(tmp_path, model.describe(), asked("quiz"))
