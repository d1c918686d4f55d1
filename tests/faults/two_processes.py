"""One of two processes that save and restore together: FOLDER PROCESS PORT; prints what it found."""

import sys
from pathlib import Path

import jax

FOLDER, PROCESS, PORT = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, PROCESS)

import jax.numpy as jnp  # noqa: E402  # after the devices are chosen
import numpy as np  # noqa: E402  # after the devices are chosen
from jax.experimental import multihost_utils  # noqa: E402  # after the devices are chosen
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402  # after the devices are chosen

from bc2_jax.checkpoint import Checkpointer  # noqa: E402  # after the devices are chosen
from bc2_jax.config import CheckpointConfig  # noqa: E402  # after the devices are chosen
from bc2_jax.manifest import DamagedCheckpoint  # noqa: E402  # after the devices are chosen
from bc2_jax.metadata import Metadata  # noqa: E402  # after the devices are chosen

sharding = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))


def array(step: int) -> jax.Array:
    whole = np.arange(64, dtype=np.float32).reshape(8, 8) + step
    return jax.make_array_from_callback((8, 8), sharding, lambda index: jnp.asarray(whole[index]))


checkpointer = Checkpointer(FOLDER, CheckpointConfig(keep_last=2))
for step in (1, 2, 3):
    checkpointer.save(step, {"w": array(step)}, {"w": array(-step)}, Metadata({"model": {}}, {}))
checkpointer.wait()
abstract = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}


def restore(step: int) -> None:
    params, moments = checkpointer.restore(step, abstract, abstract)
    for found, expected in ((params["w"], array(step)), (moments["w"], array(-step))):
        for a, b in zip(found.addressable_shards, expected.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)


restore(3)
good = checkpointer.latest_good()
# A bit that only one of the two processes verifies.
if PROCESS == 0:
    file = max((FOLDER / "3" / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
multihost_utils.sync_global_devices("damaged")
try:
    checkpointer.verify(3)
except DamagedCheckpoint as error:
    print(error, flush=True)
    good_after = checkpointer.latest_good()
checkpointer.set_aside_after(good_after)
restore(good_after)
checkpointer.save(3, {"w": array(3)}, {"w": array(-3)}, Metadata({"model": {}}, {}))
restore(3)
checkpointer.close()
print("found", good, good_after, sorted(p.name for p in FOLDER.iterdir()), flush=True)
