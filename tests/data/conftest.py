"""A tokenizer trained on the standard library's own text: no network, nothing third-party."""

import sysconfig
from pathlib import Path

import pytest

from bc2_jax.tokenizer import Tokenizer, train_tokenizer

_MODULES = ("argparse", "ast", "functools", "heapq", "json/decoder", "pathlib", "random", "textwrap")


@pytest.fixture(scope="session")
def modules() -> list[str]:
    """Source of some modules: ASCII text with code in it."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]


@pytest.fixture(scope="session")
def tokenizer(modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(modules, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 640)
