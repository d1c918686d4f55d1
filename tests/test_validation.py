"""Paths that the checkpoint library would not take as names; that it takes all others is in convert/test_paths.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bc2_jax.validation import check_path

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
