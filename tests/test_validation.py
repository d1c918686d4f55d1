"""Numbers that no config can mean are refused at once, in one short sentence; so are paths that the checkpoint library
would not take as names. (That it takes all others is in convert/test_paths.py.)"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B, MeshConfig, ModelConfig
from bc2_jax.validation import check_path, choices, divisors, show

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}
HUGE = [10**9, 10**12, 2**63, 2**70, 10**400, 10**5000]


def refused(changes: dict, kind: type = ModelConfig) -> str:
    begin = time.thread_time()
    with pytest.raises(ValueError) as error:
        dataclasses.replace(BAICHUAN2_7B, **changes) if kind is ModelConfig else kind(**changes)
    assert time.thread_time() - begin < 1
    (field,) = [name for name in changes if f".{name} = " in str(error.value)]
    assert field and "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: f"{value.bit_length()} bits")
@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind == "int"])
def test_sizes_beyond_any_model(field, value):
    if (field, value) != ("model_max_length", 10**9):  # long, and costs nothing
        refused({field: value})
    refused({field: -value})


@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind in ("int", "float")])
@pytest.mark.parametrize("value", [True, "4096", None, [1], float("nan"), float("inf"), 1 + 2j])
def test_what_is_no_number(field, value):
    refused({field: value})


def test_other_kinds_of_right_values():
    assert dataclasses.replace(BAICHUAN2_7B, rope_theta=10_000, vocab_size=np.int64(125_696)) == BAICHUAN2_7B
    refused({"num_hidden_layers": 32.0})
    refused({"normalize_head": 1})
    refused({"position_embedding": ["rope"]})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MeshConfig)])
@pytest.mark.parametrize("value", [True, "8", 2.0, -2, -(10**12)])
def test_meshes(field, value):
    refused({field: value}, MeshConfig)


def test_devices_that_nobody_simulates():
    refused({"num_cpu_devices": 10**12}, MeshConfig)


@given(st.integers(1, 5000))
def test_divisors_are_all_there_are(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("n", [2**62, 10**18 + 9, 720_720**3])
def test_divisors_of_any_number_take_no_time(n):
    begin = time.thread_time()
    found = divisors(n)
    assert time.thread_time() - begin < 1
    assert found[0] == 1 and found[-1] == n and found == sorted(found) and not any(n % d for d in found)
    assert len(choices(found)) < 1500


def test_long_values_are_cut():
    assert show("x" * 10**6).startswith("'xxx") and len(show("x" * 10**6)) < 310
    assert show("rope") == "'rope'"


REFUSED = ["a[1]", "exp[lr=1e-4]", "[", "*", "what?", "a\\b", "logs:", os.fsdecode(b"a\xff"), "a.orbax-checkpoint-tmp"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["{}", "{}/in/it", "above/{}"])
def test_names_that_are_patterns_or_urls_are_refused(tmp_path, name, place):
    with pytest.raises(ValueError, match=r"workdir = .* is not valid: the checkpoint library takes .* rename it"):
        check_path("workdir", tmp_path / place.format(name))


def test_roots_that_mean_object_stores_are_refused():
    for path in ("/gs/bucket/run", "/s3", "/az/x", "/hf/x", "//server/x"):
        with pytest.raises(ValueError, match="for something else than a name"):
            check_path("workdir", path)
    for path in ("/gsx/run", "/home/gs/run", "/home/logs:1/run", "/home/a\n/gs/run"):
        check_path("workdir", path)


def test_the_folder_that_one_is_in_counts(tmp_path, monkeypatch):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "plain").symlink_to("a[1]")
    monkeypatch.chdir(tmp_path / "a[1]")
    with pytest.raises(ValueError, match=r"workdir = 'run' is not valid: .* takes '\['"):
        check_path("workdir", "run")
    check_path("workdir", tmp_path / "plain" / "run")


def test_going_up_from_a_link_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    check_path("workdir", tmp_path / "a" / ".." / "run")
    with pytest.raises(ValueError, match="write it without"):
        check_path("workdir", Path(tmp_path / "link" / ".." / "run"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", "--workdir", "gs://bucket/run"],
        ["train", "demo", "--init-from", "s3://bucket/model"],
        ["convert", "to-hf", "run", "gs://bucket/out"],
        ["generate", "s3://bucket/model", "--prompt", "x"],
        ["tokenize", "texts", "--tokenizer", "x", "--out", "gs://bucket/rows"],
        ["evaluate", "MODEL", "--tasks", "mmlu", "--data-dir", "gs://bucket/data", "--out", "out"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_object_stores_are_refused_with_a_reason(arguments, capsys, monkeypatch, tmp_path):
    from bc2_jax.cli import programs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bc2"])
    monkeypatch.setenv("COLUMNS", "1000")
    try:
        code = programs.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = str(code) + "".join(capsys.readouterr())
    assert code and "it must be a path of a file system" in said and "Cloud Storage FUSE" in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_at_a_url_is_refused_by_the_library():
    from bc2_jax.convert.hub import local_model

    with pytest.raises(ValueError, match="the model = 'gs://bucket/model' is not valid: it must be a path of a file"):
        local_model("gs://bucket/model")
