"""A tiny model on a mesh and requests to it, the same for one process and for two."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.infer import engine
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import param_shardings, split_model
from bc2_jax.serve.requests import Request
from bc2_jax.serve.turns import Shapes
from bc2_jax.sharding import Mesh
from tests.convert.models import read_params

SHAPES = Shapes(rows=4, slots=128, chunk=64, parts=2, steps=2)


def prepared_on(mesh: Mesh, folder: Path) -> engine.Prepared:
    """The model of golden data, cut over `mesh`, which may span processes."""
    config = read_config(folder)
    graphdef = split_model(config, ComputeConfig(dtype="float32", scan_layers=True))[0]
    params = jax.tree.map(np.asarray, read_params(folder, config))
    return engine.prepare(nnx.merge(graphdef, jax.device_put(params, param_shardings(config, mesh))))


def requests() -> list[Request]:
    """More than there are rows; some share a chunk."""
    prompt = tuple(3 + (i * i) % 300 for i in range(90))
    return [
        Request(prompt[: 12 * i + 3], Settings(max_new_tokens=5 + i, eos_token_id=(), seed=i, top_k=0, temperature=1.0))
        for i in range(10)
    ]
