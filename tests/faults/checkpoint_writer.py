"""A run that only saves: FOLDER LAST. Its state after each step has a closed form. Made to be killed."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import CheckpointConfig
from bc2_jax.metadata import Metadata

SHAPE = (4, 128, 512)
CONFIG = CheckpointConfig(save_every=1, keep_last=2, keep_every=10)


def state_after(step: int) -> dict:
    """The state as a formula: sums of integers, which fp32 holds exactly, on noise that does not compress."""
    noise = np.random.default_rng(0).integers(0, 1 << 20, (8, *SHAPE)).astype(np.float32)
    return {f"w{i}": noise[i] + np.float32(step * (step + 1) // 2) for i in range(8)}


def shapes() -> dict:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {name: jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding) for name in state_after(0)}


def main(folder: Path, last: int) -> None:
    checkpointer = Checkpointer(folder, CONFIG)
    step = checkpointer.latest_good() or 0
    checkpointer.remove_leftovers()
    checkpointer.set_aside_after(step)
    state = {name: jnp.asarray(value) for name, value in state_after(0).items()}
    if step:
        state, moments = checkpointer.restore(step, shapes(), shapes())
        for name in state:
            np.testing.assert_array_equal(np.asarray(state[name]) * 2, np.asarray(moments[name]))
    print("start", step, flush=True)
    while step < last:
        step += 1
        state = {name: value + step for name, value in state.items()}
        metadata = Metadata({"model": {}}, {"next_index": step})
        checkpointer.save(step, state, {name: value * 2 for name, value in state.items()}, metadata)
        print("saving", step, flush=True)
    checkpointer.close()
    print("done", step, flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(Path(sys.argv[1]), int(sys.argv[2]))
