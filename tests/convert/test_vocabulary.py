"""Growing a vocabulary, and refusing one that is not the tokenizer's."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

import bc2_jax
from bc2_jax.convert.conversion import Options, check_vocabulary, new_rows, resize_vocab, to_hf, to_orbax
from bc2_jax.convert.source import open_source
from tests.convert.models import GOLDEN, TINY, array_bytes, random_folder


@pytest.mark.parametrize("unit", [False, True])
def test_new_rows_are_like_the_old_ones(unit):
    generator = np.random.default_rng(0)
    # Rows with a common direction and lengths from 0.1 to 10, one of them zero.
    rows = generator.standard_normal((500, 64)) * 0.1 + generator.standard_normal(64) * 0.2
    rows *= np.geomspace(0.1, 10, 500)[:, None]
    rows[3] = 0
    rows = rows.astype(np.float32)
    grown = new_rows(rows, 400, unit, np.random.default_rng(1))
    lengths = np.linalg.norm(grown, axis=1)
    assert grown.dtype == np.float32 and lengths.min() > 0 and len(np.unique(grown, axis=0)) == 400
    if unit:
        directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(lengths, np.linalg.norm(rows, axis=1).mean(), rtol=0.4)
        np.testing.assert_allclose((grown / lengths.mean()).mean(0), directions.mean(0), atol=0.03)
    else:
        np.testing.assert_allclose(np.sqrt((lengths**2).mean()), np.sqrt((rows**2).sum(1).mean()), rtol=0.05)


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_grown_model(tmp_path, name):
    old = bc2_jax.load_pretrained(GOLDEN / name)
    size = old.config.vocab_size
    done = to_orbax(GOLDEN / name, tmp_path / "a", Options(resize_vocab=size + 16, verify=True))
    assert done.config == dataclasses.replace(old.config, vocab_size=size + 16)
    new = bc2_jax.load_pretrained(tmp_path / "a")
    ids = np.arange(60).reshape(2, 30)
    logits = np.asarray(new(ids))
    np.testing.assert_allclose(logits[..., :size], old(ids), atol=1e-5)
    assert np.isfinite(logits).all()
    # New tokens are about as likely as any other, neither favoured nor dead.
    added, usual = logits[..., size:], logits[..., :size]
    assert abs(added.mean() - usual.mean()) < usual.std() and 0.3 < added.std() / usual.std() < 3
    assert np.isfinite(np.asarray(new(np.full((1, 4), size + 15)))).all()
    # Deterministic, and the same on the way to PyTorch.
    to_hf(GOLDEN / name, tmp_path / "b", Options(resize_vocab=size + 16), dtype="float32")
    assert array_bytes(tmp_path / "a") == array_bytes(tmp_path / "b")


def test_a_vocabulary_never_shrinks():
    with pytest.raises(ValueError, match="--resize-vocab 300 is not valid: the model has 320 token ids"):
        resize_vocab(open_source(GOLDEN / "rope-tiny"), 300)


def test_tokenizers_that_do_not_fit(tmp_path, tokenizer):
    assert tokenizer.vocab_size == 640
    for size, allow, message in (
        (600, True, "vocab_size = 600 is not valid: .* has 640 pieces; --resize-vocab 640 grows it"),
        (700, False, "vocab_size = 700 is not that of .* pass --allow-unused-rows"),
        (700, True, None),
        (640, False, None),
    ):
        folder = random_folder(tmp_path / f"{size}{allow}", dataclasses.replace(TINY, vocab_size=size))
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        source = open_source(folder)
        if message is None:
            check_vocabulary(source, allow)
            continue
        with pytest.raises(ValueError, match=message):
            check_vocabulary(source, allow)
        with pytest.raises(ValueError, match=message):
            to_orbax(folder, tmp_path / "out", Options(allow_unused_rows=allow))
        assert not (tmp_path / "out").exists()
    done = to_orbax(tmp_path / "600True", tmp_path / "out", Options(resize_vocab=640))
    assert done.config.vocab_size == 640 and (tmp_path / "out" / "tokenizer.model").exists()
