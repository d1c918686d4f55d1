"""One of two processes that serve together: PROCESS PORT; the first prints the tokens of its requests as JSON."""

import json
import os
import sys
import time
from pathlib import Path

import jax

PROCESS, PORT = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, PROCESS)

from bc2_jax.config import MeshConfig  # noqa: E402  # after the processes have met
from bc2_jax.serve.followers import DeviceChannel, Leader, follow  # noqa: E402
from bc2_jax.serve.requests import Tokens  # noqa: E402
from bc2_jax.serve.service import Service  # noqa: E402
from bc2_jax.serve.turns import Runner  # noqa: E402
from bc2_jax.sharding import make_mesh  # noqa: E402
from tests.serve.sliced import SHAPES, prepared_on, requests  # noqa: E402

mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
runner = Runner(prepared_on(mesh, Path(__file__).parents[1] / "golden" / "rope-tiny"), SHAPES)
if PROCESS == 1:
    follow(runner, DeviceChannel())
    print("followed", flush=True)
    os._exit(0)  # without waiting for the other, which may have ended
service = Service(Leader(runner, DeviceChannel()))
service.start()
idle = time.process_time()
time.sleep(2.5)  # with messages that there is nothing to do
print("idle", round(time.process_time() - idle, 2))
found = []
for handle in service.submit_all(requests()):
    found.append([token for event in handle if isinstance(event, Tokens) for token in event.tokens])
stats = service.stats()
print("compiled", stats.compilations, "cached", stats.cached_tokens)
print("tokens", json.dumps(found))
service.drain()
print("state", service.state, flush=True)
os._exit(0)
