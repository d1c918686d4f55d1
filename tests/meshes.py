from __future__ import annotations

import jax
from jax.sharding import Mesh

from bc2_jax.config import MeshConfig
from bc2_jax.sharding import make_mesh


def one_device_mesh() -> Mesh:
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
