"""Damaged checkpoints: any byte of any file, a kill at any moment of a save, a full disk."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax import checkpoint, manifest
from bc2_jax.checkpoint import Checkpointer, SaveError
from bc2_jax.config import CheckpointConfig
from bc2_jax.convert import pretrained
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.metadata import Metadata
from bc2_jax.train.distributed import EXIT_ERROR, EXIT_LOST
from tests.faults import preloaded
from tests.faults.harness import free_port, wait_until

WRITER = Path(__file__).with_name("checkpoint_writer.py")
writer = runpy.run_path(str(WRITER))
ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "layers": {"b": np.linspace(0, 1, 50, dtype=np.float32)}}
MOMENTS = {"count": np.zeros(1, np.int32)}
METADATA = Metadata({"model": {"hidden_size": 4}}, {"next_index": 3}, job={"row_order": {"data.seed": 1}})


def abstract():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), ARRAYS)


def save(directory: Path, *steps: int, **config) -> Checkpointer:
    checkpointer = Checkpointer(directory, CheckpointConfig(**config))
    for step in steps:
        arrays = jax.tree.map(lambda x: jnp.asarray(x + step), ARRAYS)  # noqa: B023  # called at once
        checkpointer.save(step, arrays, {"mu": arrays}, METADATA)
    checkpointer.wait()
    return checkpointer


def assert_holds(checkpointer: Checkpointer, step: int) -> None:
    params, opt_state = checkpointer.restore(step, abstract(), {"mu": abstract()})
    for saved, new, moment in zip(*map(jax.tree.leaves, (ARRAYS, params, opt_state)), strict=True):
        np.testing.assert_array_equal(saved + step, np.asarray(new))
        np.testing.assert_array_equal(saved + step, np.asarray(moment))
    assert checkpointer.metadata(step) == METADATA


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    save(directory, 1, 2).close()
    return directory


# Every file of every checkpoint, its manifest too; "anything": bytes at any place replaced by any other.
damages = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("truncate"), st.floats(0, 1, exclude_max=True), st.none()),
    st.tuples(st.just("overwrite"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("append"), st.none(), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("delete"), st.none(), st.none()),
    st.tuples(st.just("swap"), st.floats(0, 1, exclude_max=True), st.none()),
)


def inflict(files: list[Path], index: int, damage: tuple) -> None:
    kind, where, value = damage
    file = files[index]
    content = bytearray(file.read_bytes())
    place = int((where or 0) * len(content))
    if kind == "delete":
        return file.unlink()
    if kind == "swap":
        other = files[int(where * len(files))]
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return
    if kind == "flip" and content:
        content[place] ^= 1 << value
    elif kind == "truncate":
        del content[place:]
    elif kind == "overwrite":
        content[place : place + len(value)] = value
    elif kind == "append":
        content += value
    file.write_bytes(content)


@settings(max_examples=40)
@given(which=st.floats(0, 1, exclude_max=True), damage=damages)
def test_any_damage_is_detected_or_harmless(intact, tmp_path_factory, which, damage):
    directory = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(intact, directory)
    files = sorted(p for p in (directory / "2").rglob("*") if p.is_file())
    before = {p: p.read_bytes() for p in files}
    inflict(files, int(which * len(files)), damage)
    changed = {p for p in files if not p.exists() or p.read_bytes() != before[p]}
    checkpointer = Checkpointer(directory, CheckpointConfig())
    try:
        checkpointer.verify(2)
    except DamagedCheckpoint as error:
        named = str(error)
        assert changed and named.startswith(str(directory / "2")) and named.endswith(".") and "\n" not in named
        # Restoring refuses it too, and a run resumes from the previous checkpoint.
        with pytest.raises(DamagedCheckpoint):
            checkpointer.restore(2, abstract(), {"mu": abstract()})
        assert checkpointer.latest_good() == 1
        assert_holds(checkpointer, 1)
    else:
        # Nothing changed, except perhaps whitespace in the JSON of the manifest.
        assert changed <= {directory / "2" / manifest.MANIFEST_NAME}
        assert_holds(checkpointer, 2)
    checkpointer.close()
    shutil.rmtree(directory)


def test_a_flipped_bit_of_an_array_is_named(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "c")
    file = max((tmp_path / "c/2/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{file} is damaged: its SHA-256"):
        Checkpointer(tmp_path / "c", CheckpointConfig()).verify(2)


def test_a_run_killed_while_saving_goes_on_from_a_whole_checkpoint(tmp_path):
    """SIGKILL at random moments of a save; then the state is compared with its formula, bit for bit."""
    rng, before = random.Random(0), 0
    for kills in range(4):
        log = tmp_path / f"{kills}.log"
        process = preloaded.Program([str(WRITER), str(tmp_path / "c"), "40"], dict(os.environ), log)
        saves = rng.randrange(1, 4)
        wait_until(lambda: _count(log, "saving") >= saves or process.poll() is not None, "saves", every=0.002)  # noqa: B023  # called at once
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
        (start,) = (int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("start "))
        # A checkpoint that was complete when the run was killed is not lost.
        assert start >= before
        checkpointer = Checkpointer(tmp_path / "c", writer["CONFIG"])
        before = checkpointer.latest_good() or 0
        numbered = [int(p.name) for p in (tmp_path / "c").glob("*") if p.name.isdigit()]
        assert before == max(numbered, default=0), f"kill {kills} left a damaged checkpoint under a final name"
        for step in numbered:
            shapes = writer["shapes"]()
            params, moments = checkpointer.restore(step, shapes, shapes)
            for name, value in writer["state_after"](step).items():
                np.testing.assert_array_equal(np.asarray(params[name]), value)
                np.testing.assert_array_equal(np.asarray(moments[name]), value * 2)
        checkpointer.close()
    last = before + 3
    process = preloaded.Program([str(WRITER), str(tmp_path / "c"), str(last)], dict(os.environ), tmp_path / "last.log")
    assert process.wait() == 0 and f"done {last}" in (tmp_path / "last.log").read_text()
    shapes = writer["shapes"]()
    params, _ = Checkpointer(tmp_path / "c", writer["CONFIG"]).restore(last, shapes, shapes)
    for name, value in writer["state_after"](last).items():
        np.testing.assert_array_equal(np.asarray(params[name]), value)


def test_two_processes_save_verify_and_go_back_together(tmp_path):
    """Each reads half of the files; damage found by one stops both with the same message."""
    script, port, logs = WRITER.with_name("two_processes.py"), free_port(), [tmp_path / f"{i}.log" for i in range(2)]
    processes = [
        preloaded.Program([str(script), str(tmp_path / "c"), str(index), str(port)], dict(os.environ), log)
        for index, log in enumerate(logs)
    ]
    try:
        wait_until(lambda: all(process.poll() is not None for process in processes), "the end")
    finally:
        for process in processes:
            process.kill()
    outputs = [log.read_text() for log in logs]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "found 3 2 ['2', '3', '3.aside']" in output
    sentences = [[line for line in output.splitlines() if line.startswith(str(tmp_path))] for output in outputs]
    assert sentences[0] == sentences[1] and len(sentences[0]) == 1 and "is damaged: its SHA-256 is" in sentences[0][0]


def _count(log: Path, word: str) -> int:
    """Lines of `log` that begin with `word`; 0 before there is one."""
    return sum(line.startswith(word) for line in log.read_text().splitlines()) if log.exists() else 0


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Simulates a full disk: no file of this process can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(seed: int) -> dict:
    return {"a": jnp.asarray(np.random.default_rng(seed).standard_normal((64, 1024)), jnp.float32)}


@pytest.mark.parametrize("noticed_by", ["save", "wait", "close"])
def test_a_full_disk_is_one_sentence_and_the_same_step_saves_later(tmp_path, noticed_by):
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    checkpointer.save(1, noise(1), MOMENTS, METADATA)
    checkpointer.wait()
    with full_disk(50_000):
        checkpointer.save(2, noise(2), MOMENTS, METADATA)
        message = (
            rf"^{tmp_path}/c/2 could not be saved \(File too large.*\): the run stops; the last good checkpoint is "
            rf"{tmp_path}/c/1\.$"
        )
        with pytest.raises(SaveError, match=message):
            {
                "save": lambda: checkpointer.save(3, noise(3), MOMENTS, METADATA),
                "wait": checkpointer.wait,
                "close": checkpointer.close,
            }[noticed_by]()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1"]  # what does not fit does not stay
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    assert checkpointer.latest_good() == 1
    checkpointer.save(2, noise(2), MOMENTS, METADATA)
    checkpointer.close()
    assert checkpointer.latest_good() == 2


def test_a_target_that_is_none_or_disappears(tmp_path):
    (tmp_path / "file").touch()
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", CheckpointConfig())
    with pytest.raises(SaveError, match="Not a directory.*: the run stops; there is no checkpoint before it"):
        checkpointer.save(1, noise(1), MOMENTS, METADATA)
    checkpointer.close()
    checkpointer = save(tmp_path / "c", 1)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").touch()
    with pytest.raises(SaveError, match=rf"{tmp_path}/c/2 could not be saved \(.*\): the run stops; there is no"):
        checkpointer.save(2, noise(2), MOMENTS, METADATA)
        checkpointer.wait()
    checkpointer.close()


@pytest.mark.parametrize(
    "cause, code",
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), EXIT_LOST),
        (TimeoutError("Timeout waiting at barrier 'sync'"), EXIT_LOST),
        (jax.errors.JaxRuntimeError("INTERNAL: No space left on device"), EXIT_ERROR),
        (OSError(28, "No space left on device"), EXIT_ERROR),
    ],
)
def test_a_save_that_lost_another_process_is_for_the_supervisor_to_mend(tmp_path, monkeypatch, cause, code):
    def fail(*_: object, **__: object):
        raise cause

    checkpointer = save(tmp_path / "c", 1)
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", fail)
    with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(SaveError, match="2 could not be saved") as failed:
            checkpointer.save(2, noise(2), MOMENTS, METADATA)
    checkpointer.close()

    def train(*_: object, **__: object):
        raise failed.value

    monkeypatch.setattr("bc2_jax.train.loop.run", train)
    monkeypatch.setattr(sys, "argv", ["train.py", str(WRITER.parents[2] / "configs/baichuan2_7b.py")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(WRITER.parents[2] / "train.py"), run_name="__main__")
    assert end.value.code == code


def test_a_target_that_disappears_while_it_is_written(tmp_path, monkeypatch):
    checkpointer = save(tmp_path / "c", 1)
    seal = manifest.write_manifest

    def disappear(folder: Path):
        shutil.rmtree(folder)
        return seal(folder)

    monkeypatch.setattr(manifest, "write_manifest", disappear)
    checkpointer.save(2, noise(2), MOMENTS, METADATA)
    with pytest.raises(
        SaveError, match="2 could not be saved .No such file or directory.*last good checkpoint is .*/1"
    ):
        checkpointer.wait()
    checkpointer.close()
    assert_holds(Checkpointer(tmp_path / "c", CheckpointConfig()), 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(tmp_path):
    checkpointer = save(tmp_path / "c", 1)
    (tmp_path / "c").chmod(0o500)
    try:
        with pytest.raises(SaveError, match="Permission denied.*the last good checkpoint is .*/1"):
            checkpointer.save(2, noise(2), MOMENTS, METADATA)
            checkpointer.wait()
    finally:
        (tmp_path / "c").chmod(0o700)
    checkpointer.close()


def test_the_older_one_goes_only_when_the_newer_one_is_whole(tmp_path, monkeypatch):
    """With keep_last = 1 there is a good checkpoint at every moment."""
    checkpointer = save(tmp_path / "c", 1, keep_last=1)
    seal, sealing, go_on = manifest.write_manifest, threading.Event(), threading.Event()

    def wait(folder: Path):
        sealing.set()
        assert go_on.wait(60)
        return seal(folder)

    monkeypatch.setattr(manifest, "write_manifest", wait)
    checkpointer.save(2, noise(2), MOMENTS, METADATA)
    assert sealing.wait(60)
    assert checkpointer.steps() == [1]
    go_on.set()
    checkpointer.wait()
    assert checkpointer.steps() == [2]
    checkpointer.close()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_nothing_in_a_checkpoint_is_executed(intact, tmp_path, monkeypatch):
    """Pickles in place of every file, with matching hashes in the manifest, are not executed."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    names = [p.relative_to(intact / "2") for p in sorted((intact / "2").rglob("*")) if p.is_file()]
    for name in names:
        if name.name == manifest.MANIFEST_NAME:
            continue
        directory = tmp_path / "c"
        shutil.copytree(intact, directory)
        (directory / "2" / name).write_bytes(bomb)
        manifest.write_manifest(directory / "2")
        checkpointer = Checkpointer(directory, CheckpointConfig())
        with contextlib.suppress(Exception):
            checkpointer.metadata(2)
            checkpointer.restore(2, abstract(), {"mu": abstract()})
        with contextlib.suppress(ValueError, OSError):
            pretrained.load_params(directory / "2")
        assert not (tmp_path / "exploded").exists(), name
        checkpointer.close()
        shutil.rmtree(directory)
    pickle.loads(bomb)  # it is one
    assert (tmp_path / "exploded").is_dir()
