"""tools/launch_tpu.sh: what it would run, and what it does with a gcloud whose workers are folders on this machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fake_gcloud import Cloud, make_clone

BASE = ["--name", "pod", "--zone", "us-east5-a"]
SLICE = ["--accelerator", "v5p-16"]
CONFIG = ["configs/my config.py", "--workdir", "/mnt/it's here", "--name", 'a "b" $HOME']
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DESCRIBE = [*QUEUED, "describe", "pod", "--zone=us-east5-a", "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", "pod", "--zone=us-east5-a", "--force", "--quiet"]
CREATE = [
    *QUEUED,
    "create",
    "pod",
    "--zone=us-east5-a",
    "--accelerator-type=v5p-16",
    "--runtime-version=v2-alpha-tpuv5",
]
SSH = [*QUEUED, "ssh", "pod", "--zone=us-east5-a", "--node=all", "--worker=all"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def cloud(tmp_path: Path, clone: Path) -> Cloud:
    return Cloud(tmp_path, clone)


def run(cloud: Cloud, *options: str) -> subprocess.CompletedProcess[str]:
    return cloud.launch("run", *BASE, *SLICE, "--logs", "logs", *options, "--", *CONFIG)


# ---------------------------------------------------------------- dry run


def dry(cloud: Cloud, *args: str) -> list[list[str]]:
    """The printed commands as the words a shell makes of them; nothing was run."""
    result = cloud.launch(*args, "--dry-run") if "--" not in args else None
    if result is None:
        at = args.index("--")
        result = cloud.launch(*args[:at], "--dry-run", *args[at:])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert cloud.calls() == []
    lines = re.sub(r"/\S*/bc2_jax\.tar\.gz", "ARCHIVE", result.stdout).splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    "options, flags",
    [
        ([], ["--node-id=pod"]),
        (["--spot"], ["--node-id=pod", "--spot"]),
        (["--reserved"], ["--node-id=pod", "--reserved"]),
        (["--slices", "2"], ["--node-count=2", "--node-prefix=pod"]),
        (["--slices", "3", "--spot"], ["--node-count=3", "--node-prefix=pod", "--spot"]),
    ],
)
def test_dry_create(cloud: Cloud, options: list[str], flags: list[str]) -> None:
    assert dry(cloud, "create", *BASE, *SLICE, *options) == [DESCRIBE, [*CREATE, *flags], DESCRIBE]


@pytest.mark.parametrize(
    "accelerator, version",
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_versions(cloud: Cloud, accelerator: str, version: str) -> None:
    create = dry(cloud, "create", *BASE, "--accelerator", accelerator)[1]
    assert f"--accelerator-type={accelerator}" in create and f"--runtime-version={version}" in create
    other = dry(cloud, "create", *BASE, "--accelerator", accelerator, "--runtime-version", "mine")[1]
    assert "--runtime-version=mine" in other


def test_dry_run(cloud: Cloud) -> None:
    options = [*SLICE, "--slices", "2", "--spot", "--project", "my-project", "--internal-ip", "--setup", "mount 'a b'"]
    lines = dry(cloud, "run", *BASE, *options, "--logs", "my logs", "--", *CONFIG)
    assert all("--project=my-project" in line for line in lines if line[0] == "gcloud")
    verbs = [line[4] if line[0] == "gcloud" else line[0] for line in lines]
    steps = ["git", "describe", "create", "describe", "scp", "ssh", "ssh", "describe", "ssh", "mkdir"]
    assert verbs == steps + ["describe", "scp"] * 2
    assert lines[0][3:] == ["archive", "--format=tar.gz", "--output=ARCHIVE", "HEAD"]
    everywhere = ["--zone=us-east5-a", "--project=my-project", "--node=all", "--worker=all", "--internal-ip"]
    assert lines[4] == [*QUEUED, "scp", "ARCHIVE", "pod:bc2_jax.tar.gz", *everywhere]
    install, start, report = (lines[i][-1].removeprefix("--command=") for i in (5, 6, 8))
    assert lines[5] == [*QUEUED, "ssh", "pod", *everywhere, f"--command={install}"]
    assert "uv venv --quiet --python 3.11 bc2_venv" in install and "-e './bc2_jax[tpu]'" in install
    assert "{ mount 'a b'; }" in start
    words = shlex.split(start)
    at = words.index("tools/supervise.sh")
    assert words[at : at + 6] == [
        *("tools/supervise.sh", "--folder", "../bc2_run", "--"),
        *("../bc2_venv/bin/python", "train.py"),
    ]
    assert words[at + 6 : at + 13] == [*CONFIG, "--resume", "auto"]
    assert "exit_code" in report
    assert lines[11][:6] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", "pod-0:bc2_run/train.log"]
    assert lines[11][6] == "my logs/pod-0-0.log" and lines[13][6] == "my logs/pod-1-0.log"


def test_dry_others(cloud: Cloud) -> None:
    assert dry(cloud, "delete", *BASE) == [DELETE]
    status = dry(cloud, "status", *BASE)
    assert status[0] == DESCRIBE and status[1][:-1] == SSH and len(status) == 2
    (stop,) = dry(cloud, "stop", *BASE)
    assert stop[:-1] == SSH and "kill -TERM" in stop[-1]
    logs = dry(cloud, "logs", *BASE)
    assert re.fullmatch(r"logs/pod/\d{8}-\d{6}", logs[0][2])
    assert [line[:5] for line in logs[1:]] == [["gcloud", "compute", "tpus", "tpu-vm", v] for v in ("describe", "scp")]


@pytest.mark.parametrize("given", [["--resume", "never"], ["--resume=auto"]])
def test_resume_of_the_user_is_kept(cloud: Cloud, given: list[str]) -> None:
    start = dry(cloud, "run", *BASE, *SLICE, "--", *CONFIG, *given)[6][-1]
    assert start.count("--resume") == 1 and shlex.join(given) in start


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND = '' is not valid: it must be create, run,"),
        (["destroy"], "COMMAND = 'destroy' is not valid"),
        (["status", "--zone", "us-east5-a"], "--name = '' is not valid: it must be 1 to 40 lower-case letters"),
        (["status", "--name", "-x", "--zone", "us-east5-a"], "--name = '-x' is not valid"),
        (["status", "--name", "pod"], "--zone = '' is not valid: it must be a zone such as"),
        (["status", *BASE, "--slices", "0"], "--slices = '0' is not valid: it must be a whole number"),
        (["status", *BASE, "--poll", "a[$(touch pwned)]"], "is not valid: it must be a whole number"),
        (["status", *BASE, "--max-failures"], "--max-failures needs a value"),
        (["status", *BASE, "extra"], "'extra' is not valid: it must be an option"),
        (["status", *BASE, "--", "c.py"], "'c.py' is not valid: only run takes a config"),
        (["create", *BASE], "--accelerator = '' is not valid: it must be v4-N"),
        (["create", *BASE, "--accelerator", "tpu7x-8"], "--accelerator = 'tpu7x-8' is not valid"),
        (["create", *BASE, *SLICE, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        (["run", *BASE, *SLICE], "CONFIG = '' is not valid: it must be a config"),
        (["run", *BASE, *SLICE, "--", "c.py"], "--workdir = '' is not valid: it must be a folder that all workers"),
        (["run", *BASE, *SLICE, "--", "c.py", "--workdir=gs://b/r"], "--workdir = 'gs://b/r' is not valid"),
        (["run", *BASE, *SLICE, "--revision", "--output=x", "--", *CONFIG], "--revision = '--output=x' is not valid"),
        (["run", *BASE, *SLICE, "--revision", "nowhere", "--", *CONFIG], "--revision = 'nowhere' is not valid"),
        *(
            (
                ["run", *BASE, *SLICE, *dry, "--", name, *CONFIG[1:]],
                f"CONFIG = '{name}' is not valid: it must be a file of",
            )
            for name in ("configs/none.py", "my config.py", "/etc/c.py", "configs/new.py", "../configs/my config.py")
            for dry in ([], ["--dry-run"])
        ),
    ],
)
def test_bad_arguments(cloud: Cloud, arguments: list[str], message: str) -> None:
    (cloud.clone / "configs" / "new.py").touch()  # not committed
    result = cloud.launch(*arguments)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr
    assert cloud.calls() == [] and not (cloud.cwd / "pwned").exists()


# ---------------------------------------------------------------- booking


@pytest.mark.parametrize(
    "states, created, deleted",
    [
        (["ACTIVE"], 0, 0),
        (["GONE", "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 1, 0),
        (["WAITING_FOR_RESOURCES", "ACTIVE"], 0, 0),
        (["SUSPENDING", "SUSPENDED", "GONE", "ACTIVE"], 1, 1),
        (["FAILED", "DELETING", "GONE", "CREATING", "FAILED", "GONE", "ACTIVE"], 2, 2),
        (["ERROR", "ERROR", "ACTIVE"], 0, 0),
    ],
)
def test_waits_until_active(cloud: Cloud, states: list[str], created: int, deleted: int) -> None:
    cloud.say("states", *states)
    result = cloud.launch("create", *BASE, *SLICE)
    assert result.returncode == 0, result.stderr
    assert len(cloud.calls("create")) == created and cloud.calls("delete") == [DELETE] * deleted
    asked = [call for call in cloud.calls("describe") if call[-1] == DESCRIBE[-1]]
    assert len(asked) == len(states)


@pytest.mark.parametrize("state, message", [("ERROR", "no network"), ("FAILED", "the booking is FAILED")])
def test_gives_up(cloud: Cloud, state: str, message: str) -> None:
    cloud.say("states", state)
    result = cloud.launch("create", *BASE, *SLICE, "--max-failures", "2")
    assert result.returncode == 1
    assert message in result.stderr and "--max-failures = 2 is reached" in result.stderr


# ---------------------------------------------------------------- runs


def test_run_on_two_slices(tmp_path: Path, clone: Path) -> None:
    cloud = Cloud(tmp_path, clone, slices=2)
    for worker in cloud.workers:
        cloud.codes(worker, "75", "134", "0")
    result = run(cloud, "--slices", "2", "--setup", 'echo "$HOME is set up" > setup')
    assert result.returncode == 0, result.stderr
    assert cloud.starts() == [3] * 4
    for worker in cloud.workers:
        home = cloud.folder / "workers" / worker
        arguments = (cloud.folder / "starts" / f"{worker}.args").read_text().split("\0")[:-1]
        assert arguments == ["train.py", *CONFIG, "--resume", "auto"]
        assert (home / "setup").read_text() == f"{home} is set up\n"
        assert "-e ./bc2_jax[tpu]" in (home / "installed").read_text()
        log = (cloud.cwd / "logs" / f"{worker}.log").read_text()
        assert log.count(f"output of {worker}\n") == 3 and "preempted, exit code 75" in log


def test_error_of_the_user_ends_the_run_everywhere(cloud: Cloud) -> None:
    cloud.codes("pod-0", "0w")
    cloud.codes("pod-1", "1")
    result = run(cloud)
    assert result.returncode == 1 and "ended with exit code 1" in result.stderr
    assert cloud.starts() == [1, 1]
    deadline = time.monotonic() + 30
    ended = cloud.folder / "workers/pod-0/bc2_run/exit_code"
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ended.read_text() == "75 stopped\n"


@pytest.mark.parametrize("sign", ["booking", "slice"])
def test_spot_slice_is_booked_again(cloud: Cloud, sign: str) -> None:
    for worker in cloud.workers:
        cloud.codes(worker, "75w", "0")
    if sign == "booking":
        cloud.say("states", "GONE", "CREATING", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "GONE", "ACTIVE")
    else:  # the booking stays ACTIVE, but nobody answers: scp, install, start, one report, then nothing
        cloud.say("states", "GONE", "ACTIVE", "ACTIVE", "ACTIVE", "GONE", "ACTIVE")
        cloud.say("ssh", "0", "0", "0", "0", "1", "0")
        cloud.say("node", "PREEMPTED", "READY")
    result = run(cloud, "--spot")
    assert result.returncode == 0, result.stderr
    assert cloud.calls("create") == [[*CREATE, "--node-id=pod", "--spot"]] * 2 and cloud.calls("delete") == [DELETE]
    assert cloud.starts() == [2, 2]
    arguments = (cloud.folder / "starts/pod-0.args").read_text().split("\0")
    assert arguments[-3:-1] == ["--resume", "auto"]


@pytest.mark.parametrize("failing", [0, 2])
def test_ssh_that_fails_once(cloud: Cloud, failing: int) -> None:
    cloud.say("ssh", *["0"] * failing, "1", "0")
    result = run(cloud)
    assert result.returncode == 0, result.stderr
    assert cloud.starts() == [1, 1] and cloud.calls("create", "delete") == []


def test_ssh_that_fails_for_ever(cloud: Cloud) -> None:
    cloud.say("ssh", *["1"] * 20)
    result = run(cloud, "--max-failures", "3")
    assert result.returncode == 1 and "could not be started on all workers" in result.stderr
    assert cloud.starts() == [0, 0]


def test_machine_that_starts_again(cloud: Cloud) -> None:
    for worker in cloud.workers:
        cloud.codes(worker, "0w", "0w")
    with cloud.start("run", *BASE, *SLICE, "--logs", "logs", "--", *CONFIG) as process:
        cloud.wait_for_starts(1, 1)
        # The system's SIGTERM, as before a reboot; the disk stays.
        os.kill(int((cloud.folder / "workers/pod-0/bc2_run/pid").read_text()), signal.SIGTERM)
        cloud.wait_for_starts(2, 1)
        cloud.wait_for_report()
        (cloud.folder / "go").touch()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert cloud.starts() == [2, 1]


def test_launcher_that_is_started_again_takes_up_the_run(cloud: Cloud) -> None:
    for worker in cloud.workers:
        cloud.codes(worker, "0w", "1")
    with cloud.start("run", *BASE, *SLICE, "--logs", "logs", "--", *CONFIG) as first:
        cloud.wait_for_starts(1, 1)
        first.terminate()
    marks = [cloud.folder / "workers" / worker / "bc2_jax/mark" for worker in cloud.workers]
    for mark in marks:
        mark.touch()
    status = cloud.launch("status", *BASE)
    assert status.stdout.splitlines()[0] == "ACTIVE" and status.stdout.count(" running\n") == 2
    with cloud.start("run", *BASE, *SLICE, "--logs", "logs", "--", *CONFIG) as second:
        cloud.wait_for_report()
        (cloud.folder / "go").touch()
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert cloud.starts() == [1, 1] and all(mark.exists() for mark in marks)
    assert cloud.launch("status", *BASE).stdout.count(" ended 0\n") == 2


def test_stop(cloud: Cloud) -> None:
    for worker in cloud.workers:
        cloud.codes(worker, "0w")
    with cloud.start("run", *BASE, *SLICE, "--", *CONFIG) as process:
        cloud.wait_for_starts(1, 1)
        process.terminate()
    assert cloud.launch("stop", *BASE).returncode == 0
    deadline = time.monotonic() + 30
    while cloud.launch("status", *BASE).stdout.count(" ended 75 stopped\n") < 2:
        assert time.monotonic() < deadline
    assert cloud.launch("stop", *BASE).returncode == 0  # nothing to stop
    assert cloud.starts() == [1, 1]
