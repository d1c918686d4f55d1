"""The adapter for lm-eval where lm-eval is not installed; what it does is tested in tests/lm_eval."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_a_missing_package_is_named(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # so that it is as before again
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "bc2_jax.evaluate.lm_eval", raising=False)
    with pytest.raises(ValueError, match=r"^Tasks of lm-eval need lm-eval .*: pip install 'bc2_jax\[eval\]'\.$"):
        importlib.import_module("bc2_jax.evaluate.lm_eval")
