"""Eight simulated CPU devices, the hypothesis profile, the golden data of tests/golden, a tokenizer made here."""

from __future__ import annotations

import functools
import gc
import math
import os
import signal
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import settings

from bc2_jax.config import MeshConfig, ModelConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import Mesh, make_mesh, use_cpu_devices
from bc2_jax.tokenizer import Tokenizer, train_tokenizer
from tests.compiler import QUICK_COMPILE
from tests.convert.models import from_torch, read_params

# Programs that a script starts in its background ignore SIGINT, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
use_cpu_devices(8)  # before any test can start the backend
gc.set_threshold(50_000, 20, 100)  # jax keeps so many objects that the usual threshold costs an eighth of the time

# Workers and subprocesses inherit this. What several of them compile is compiled once; the user's own cache is
# left alone. Small programs that run a few times take far longer to compile than to run: see tests/compiler.py.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["XLA_FLAGS"] = f"{QUICK_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)

_LONG = ("faults", "train", "align", "infer", "model", "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders with the longest files first: a file is never cut, so that none of those should be the last."""
    order = {folder: number for number, folder in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


settings.register_profile("bc2_jax", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("bc2_jax")


class Golden(NamedTuple):
    """What the PyTorch code computed on a tiny model, and that model's weights as ours."""

    folder: Path
    config: ModelConfig
    params: Params
    arrays: Mapping[str, np.ndarray]
    gradients: Params
    """Of arrays["train_loss"], in our layout."""


@pytest.fixture(scope="session", params=["rope-tiny", "alibi-tiny"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = Path(__file__).parent / "golden" / request.param
    config = read_config(folder)
    arrays = dict(np.load(folder / "golden.npz"))
    gradients = from_torch(config, lambda name: arrays[f"grad/{name}"])
    return Golden(folder, config, read_params(folder, config), arrays, gradients)


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """(data, fsdp, tensor, fsdp_inner = 1, context = 1) -> a mesh on the first devices."""

    @functools.cache
    def make(data: int, fsdp: int, tensor: int, fsdp_inner: int = 1, context: int = 1) -> Mesh:
        devices = jax.devices()[: math.prod((data, fsdp, tensor, fsdp_inner, context))]
        return make_mesh(
            MeshConfig(data=data, fsdp=fsdp, fsdp_inner=fsdp_inner, context=context, tensor=tensor), devices
        )

    return make


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """490 pieces, of one sentence and five characters."""
    texts = ["the cat sat on the mat and the dog sat on the log 白日依山尽 "] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("small_tokenizer") / "tokenizer.model", 490)


_MODULES = ("argparse", "ast", "functools", "heapq", "json/decoder", "shutil", "random", "textwrap")


@pytest.fixture(scope="session")
def modules() -> list[str]:
    """Source of some modules: ASCII text with code in it."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]


@pytest.fixture(scope="session")
def tokenizer(modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(modules, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 640)
