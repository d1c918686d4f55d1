"""A path is bytes: no URL, no pattern. Every legal one works, or is refused before anything is written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bc2_jax.convert.conversion import Options, to_hf, to_orbax
from bc2_jax.convert.inspection import diff, inspect
from bc2_jax.convert.pretrained import find_tokenizer, load_params, save_params
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import check_path
from tests.convert.models import TINY, array_bytes, random_folder, random_params, tensor_bytes

SPECIAL = [
    "%20", "%2e%2e", "%2F", "%", "#", "?", "|", "\\", "[", "]", "[a]", "*", "{a}", "!", "~", "$HOME", "&", ";", ":",
    "gs:", "'", '"', "`", "<", ">", "=", "+", "@", "^", ",", " ", "\t", "\n", "\x01", "é", "e\u0301", "模", "\u2028",
    "-", "..", os.fsdecode(b"\xff"),
]  # fmt: skip
PLACES = ("{}", "{}/in", "above/{}/below/in")
names = st.lists(st.sampled_from([*SPECIAL, "a", "b"]), min_size=1, max_size=6).map("".join)
legal_names = names.filter(lambda name: name not in (".", ".."))


def is_legal(path: Path) -> bool:
    try:
        check_path("path", path)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The same model as `hf`, `orbax` and `trained`, which Orbax wrote; another as `other`."""
    root = tmp_path_factory.mktemp("models")
    to_orbax(random_folder(root / "hf", seed=1), root / "orbax")
    save_params(random_params(TINY, np.float32, 1), TINY, root / "trained")
    save_params(random_params(TINY, np.float32, 2), TINY, root / "other")
    return root


@given(legal_names, st.sampled_from(PLACES))
@example("m%20b", "{}")
@example("".join(c for c in SPECIAL if c not in ("?", "\\", "[", "[a]", "*", "gs:", SPECIAL[-1])), "above/{}/below/in")
@settings(max_examples=6)
def test_there_and_back(models, tmp_path_factory, name, place):
    root = tmp_path_factory.mktemp("there")
    source, target, back = (root / part / place.format(name) for part in ("source", "target", "back"))
    shutil.copytree(models / "hf", source)
    if is_legal(target):
        to_orbax(source, target, Options(verify=True))
        assert diff(source, target).is_same and inspect(target).is_consistent
        assert load_params(target)[1] == TINY
    else:
        with pytest.raises(ValueError, match="for something else than a name"):
            to_orbax(source, target)
        with pytest.raises(ValueError, match="for something else than a name"):
            save_params(random_params(TINY, np.float32), TINY, target)
        assert not (root / "target").exists()
        target = models / "orbax"
    to_hf(target, back, Options(verify=True))
    assert tensor_bytes(back) == tensor_bytes(models / "hf")
    # Nothing beside what was asked for: no folder of a decoded name, no lock, nothing half-done.
    left = [path for path in (root / "target", root / "back") for path in [path, *path.rglob("*")] if path.exists()]
    for path in left:
        wanted = target if path.is_relative_to(root / "target") else back
        assert path.is_relative_to(wanted) or wanted.is_relative_to(path), path


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
def test_reading_with_other_models_beside(models, tmp_path, special):
    """What the name means as a URL, as a pattern or with another separator is there too, and is another model."""
    name = f"m{special}b"
    decoys = {unquote(name), unquote(name).replace("\\", "/"), re.split("[#?|]", name)[0], "mab"} - {name}
    for number, place in enumerate(PLACES):
        root = tmp_path / str(number)
        path = root / place.format(name)
        for target, model in [(path, "trained"), *((root / place.format(decoy), "other") for decoy in decoys)]:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(models / model)
        if is_legal(path):
            params = load_params(path)[0]
            np.testing.assert_array_equal(
                params["norm"]["weight"], random_params(TINY, np.float32, 1)["norm"]["weight"]
            )
        else:
            with pytest.raises(ValueError, match=r"^path = .* for something else than a name"):
                load_params(path)


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
def test_the_tokenizer_is_found_and_read(tokenizer, tmp_path, special):
    for place in PLACES:
        folder = tmp_path / place.format(f"m{special}b")
        folder.mkdir(parents=True)
        shutil.copy(tokenizer.path, folder / "tokenizer.model")
        assert Tokenizer(find_tokenizer(folder)).vocab_size == tokenizer.vocab_size


def test_a_link_with_a_plain_name_leads_to_any_place(models, tmp_path):
    (tmp_path / "exp[lr=1e-4]").mkdir()
    (tmp_path / "plain").symlink_to("exp[lr=1e-4]")
    to_orbax(models / "hf", tmp_path / "plain" / "a")
    assert (tmp_path / "exp[lr=1e-4]" / "a" / "params").is_dir()
    assert array_bytes(tmp_path / "plain" / "a") == array_bytes(models / "orbax")


def test_names_that_are_too_long_are_refused_before_anything_is_written(models, tmp_path):
    for convert in (to_orbax, to_hf):
        with pytest.raises(ValueError, match="its name has 250 bytes; at most 210 are possible"):
            convert(models / "hf", tmp_path / "above" / ("x" * 250))
        convert(models / "hf", tmp_path / convert.__name__ / ("x" * 210))
    assert not (tmp_path / "above").exists()
