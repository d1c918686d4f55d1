"""A gcloud whose workers are folders on this machine, and tools/launch_tpu.sh run with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Records its calls; states, failures of ssh and the state of the node come from files; a worker is a folder that is its
# home, where what ssh is told to run is run.
GCLOUD = r"""
import os, sys
fake, args = os.environ["FAKE"], sys.argv[1:]
with open(f"{fake}/calls", "a") as file:
    file.write("\0".join(["gcloud", *args]) + "\n")

def following(name, default):
    path = f"{fake}/{name}"
    lines = open(path).read().split() if os.path.exists(path) else []
    if len(lines) > 1 or name == "ssh":
        open(path, "w").write("\n".join(lines[1:]))
    return lines[0] if lines else default

kind, verb = args[2:4]
option = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
names = sorted(os.listdir(f"{fake}/workers"))
homes = [f"{fake}/workers/{name}" for name in names]
if kind == "tpu-vm" and verb == "describe":
    count = sum(name.rpartition("-")[0] == args[4] for name in names)
    print(following("node", "READY") if option["format"] == "value(state)" else count)
elif verb == "describe" and option["format"] == "value(state.state)":
    state = following("states", "ACTIVE")
    if state == "GONE":
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found")
    if state == "ERROR":
        sys.exit("ERROR: (gcloud) no network")
    print(state)
elif verb == "delete":
    for home in homes:  # the machine is gone, at once
        if os.path.exists(f"{home}/bc2_run/pid"):
            os.system(f"kill -9 -$(cat {home}/bc2_run/pid) 2> /dev/null")
        os.system(f"rm -rf {home}/*")
elif verb in ("scp", "ssh") and following("ssh", "0") != "0":
    sys.exit("no connection")
elif verb == "scp":
    node, separator, path = args[4].partition(":")
    download = [(f"{fake}/workers/{node}-{option.get('worker')}/{path}", args[5])]
    upload = [(args[4], f"{home}/{args[5].partition(':')[2]}") for home in homes]
    for source, target in download if separator else upload:
        with open(source, "rb") as read, open(target, "wb") as write:
            write.write(read.read())
elif verb == "ssh":
    codes = []
    for home in homes:
        os.chdir(home)
        environment = {**os.environ, "HOME": home, "PATH": f"{fake}/worker_bin:{os.environ['PATH']}"}
        codes.append(os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", option["command"]], environment))
    sys.exit(max(codes))
"""

# On a worker, `python3 -m uv venv` makes a python that is the run. Its n-th start ends with the worker's n-th code, at
# once or, if there is a "w" behind the code, when there is a file `go`.
PYTHON3 = """#!/bin/bash
echo "$@" >> installed
if [ "$3" = venv ]; then mkdir -p bc2_venv/bin && cp "$FAKE/run" bc2_venv/bin/python; fi
"""
RUN = """#!/bin/bash
starts=$FAKE/starts/$(basename ~)
printf '%s\\0' "$@" > $starts.args
echo start >> $starts
trap 'exit 75' TERM
code=$(sed -n "$(wc -l < $starts)p" $FAKE/codes/$(basename ~))
echo "output of $(basename ~)"
if [[ $code == *w ]]; then while [ -d ~/bc2_run ] && [ ! -e $FAKE/go ] && ((SECONDS < 90)); do /bin/sleep 0.02; done; fi
exit ${code%w}
"""


class Cloud:
    """The fake, with two workers a slice, and tools/launch_tpu.sh of a clone."""

    def __init__(self, folder: Path, clone: Path, slices: int = 1):
        self.folder, self.clone, self.cwd = folder / "fake", clone, folder
        for name in ("bin", "worker_bin", "workers", "starts", "codes"):
            (self.folder / name).mkdir(parents=True)
        nodes = ["pod"] if slices == 1 else [f"pod-{i}" for i in range(slices)]
        self.workers = [f"{node}-{worker}" for node in nodes for worker in range(2)]
        for worker in self.workers:
            (self.folder / "workers" / worker).mkdir()
            self.codes(worker, "0")
        self.program("bin/gcloud", f"#!{sys.executable} -ES\n{GCLOUD}")
        self.program("bin/sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
        self.program("worker_bin/python3", PYTHON3)
        self.program("run", RUN)
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "FAKE": str(self.folder)}

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def codes(self, worker: str, *codes: str) -> None:
        (self.folder / "codes" / worker).write_text("\n".join(codes) + "\n")

    def say(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("\n".join(lines))

    @contextlib.contextmanager
    def start(self, *args: str) -> Iterator[subprocess.Popen[str]]:
        """The launcher, killed in the end if it has not ended by then."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [self.clone / "tools/launch_tpu.sh", *args]
        with subprocess.Popen(command, env=self.environment, cwd=self.cwd, **pipes) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()

    def launch(self, *args: str) -> subprocess.CompletedProcess[str]:
        with self.start(*args) as process:
            output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, output, errors)

    def calls(self, *verbs: str) -> list[list[str]]:
        file = self.folder / "calls"
        calls = [line.split("\0") for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if not verbs or call[4] in verbs]

    def wait_for_report(self) -> None:
        """Until the launcher has asked the workers once more."""
        before, deadline = len(self.reports()), time.monotonic() + 30
        while len(self.reports()) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def reports(self) -> list[list[str]]:
        return [call for call in self.calls("ssh") if 'echo "worker' in call[-1]]

    def starts(self) -> list[int]:
        files = [self.folder / "starts" / worker for worker in self.workers]
        return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]

    def wait_for_starts(self, *counts: int) -> None:
        deadline = time.monotonic() + 30
        while self.starts() != list(counts):
            assert time.monotonic() < deadline, f"starts are {self.starts()}, not {counts}"
            time.sleep(0.01)


def make_clone(folder: Path) -> Path:
    """A git repository with the two tools and a config."""
    (folder / "tools").mkdir()
    (folder / "configs").mkdir()
    (folder / "configs" / "my config.py").touch()
    for tool in ("launch_tpu.sh", "supervise.sh"):
        shutil.copy(ROOT / "tools" / tool, folder / "tools")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "tools"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder
