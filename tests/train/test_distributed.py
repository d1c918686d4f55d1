"""Start and coordination seen from a single process; tests/faults runs several."""

from __future__ import annotations

import dataclasses
import http.server
import os
import runpy
import signal
import threading
from pathlib import Path

import jax
import pytest

from bc2_jax.config import DistributedConfig
from bc2_jax.train import distributed


@pytest.fixture
def tpu(monkeypatch) -> pytest.MonkeyPatch:
    """As on a TPU host whose environment says nothing and whose metadata server does not answer."""
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    return monkeypatch


@pytest.fixture
def metadata(tpu):
    """A local metadata server with these attributes, which requires Google's request header."""
    attributes: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance/attributes" and name in attributes
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tpu.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield attributes
        server.shutdown()


def test_there_is_one_host_where_there_is_no_tpu(monkeypatch):
    monkeypatch.setattr(distributed, "has_tpu", lambda: False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert distributed.count_tpu_hosts() == 1


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "ignored"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),
    ],
)
def test_the_environment_of_gke_tells_the_hosts(tpu, environment, hosts):
    for name, value in environment.items():
        tpu.setenv(name, value)
    assert distributed.count_tpu_hosts() == hosts


def test_the_metadata_of_a_tpu_vm_tells_the_hosts(metadata):
    assert distributed.count_tpu_hosts() == 1
    metadata["worker-network-endpoints"] = "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"
    assert distributed.count_tpu_hosts() == 2
    metadata["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '4'\nWORKER_ID: '0'\n"
    assert distributed.count_tpu_hosts() == 8


def test_a_second_signal_ends_at_once_and_none_is_caught_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached() and preemption.reached()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_is_too_late_after_the_first_computation():
    """JAX already computes in the tests; nothing may wait for processes that never come."""
    assert jax.device_count() == 8
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "demo.py"))["config"]()
    several = DistributedConfig(coordinator_address="127.0.0.1:1", num_processes=2, process_id=1, start_timeout=1)
    mesh = dataclasses.replace(config.mesh, num_cpu_devices=8, fsdp=-1, tensor=4)
    with pytest.raises(ValueError, match="distributed.num_processes = 2 is not possible: JAX already computes"):
        distributed.start(dataclasses.replace(config, mesh=mesh, distributed=several))
