from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from cluster.config import RayConfig
from cluster.errors import ConfigError, ResourceTimeoutError
from cluster.ray_runtime import RaySession, _resolve, format_resources, ray_session, wait_for_cluster
from tests.cluster.sockets import listening_outside_loopback

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any cluster."""
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_embedded_cluster_listens_on_loopback_only(ray_cluster: RaySession) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    names = set[str]()
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            names.add(process.name())
    assert {"gcs_server", "raylet"} <= names
    assert listening_outside_loopback(processes) == []
    assert ray_cluster.kind == "embedded"
    assert ray_cluster.node_ip == "127.0.0.1"
    assert ray_cluster.address.startswith("127.0.0.1:")
    assert ray_cluster.resources["CPU"] == 4


def test_a_session_within_a_session_shares_and_does_not_end_it(ray_cluster: RaySession) -> None:
    with ray_session(RayConfig(num_cpus=1)) as inner:
        assert inner.kind == "shared"
        assert inner.address == ray_cluster.address
    assert ray.is_initialized()


def test_workers_import_the_project(ray_cluster: RaySession) -> None:
    def location() -> str:
        import cluster

        return str(cluster.__file__)

    assert ray.get(ray.remote(location).remote(), timeout=60) == str(ROOT / "cluster/__init__.py")


@pytest.mark.parametrize("num_sessions", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_embedded_sessions_leave_nothing_behind_and_ignore_other_clusters(tmp_path: Path, num_sessions: int) -> None:
    """In a row in one process, with an unusable RAY_ADDRESS, a home and a folder of their own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib\n"
        "from cluster.config import RayConfig\n"
        "from cluster.ray_runtime import ray_session\n"
        "import ray\n"
        "def work():\n    import models\n    return os.environ['PYTHONPATH']\n"
        "before = dict(os.environ)\n"
        f"for _ in range({num_sessions}):\n"
        "    with ray_session(RayConfig(address='local', num_cpus=1, object_store_memory_mb=80)) as session:\n"
        "        print(session.kind, ray.get(ray.remote(work).remote(), timeout=60))\n"
        "        (folder,) = pathlib.Path(os.environ['RAY_TMPDIR']).iterdir()\n"
        "        assert folder.stat().st_mode & 0o077 == 0, 'others may not even enter it'\n"
        "assert not ray.is_initialized()\n"
        "changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}\n"
        "print(*sorted(changed))\n"
        "print(sorted(str(p.relative_to(pathlib.Path.home())) for p in pathlib.Path.home().rglob('*')))\n"
        "print(os.listdir(os.environ['RAY_TMPDIR']))\n"
    )
    # Under /tmp, because pytest's own folder is too deep for Unix sockets.
    short = Path("/tmp") / f"mc-t{os.getpid()}"
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment |= {"RAY_ADDRESS": "127.0.0.1:9", "RAY_TMPDIR": str(short), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        expected = f"embedded {ROOT}{os.pathsep}{ROOT}"
        *sessions, changed, in_home, in_temporary = done.stdout.splitlines()
        assert sessions == [expected] * num_sessions
        may_change = {"RAY_CLIENT_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "PYTHONBREAKPOINT"}  # set by Ray
        assert set(changed.split()) <= may_change, "no token, no path, no address"
        assert in_home == "[]", "no ~/.ray/auth_token"
        assert in_temporary == "[]", "no session folder"
    finally:
        if short.exists():
            short.rmdir()


def test_auto_is_the_submitted_jobs_cluster_then_ray_address_then_embedded(outside: pytest.MonkeyPatch) -> None:
    assert _resolve(RayConfig()).kind == "embedded"
    outside.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert (_resolve(RayConfig()).kind, _resolve(RayConfig()).address) == ("existing", "10.0.0.5:6379")
    assert not _resolve(RayConfig()).is_loopback
    outside.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert _resolve(RayConfig()).kind == "submitted"
    assert _resolve(RayConfig(address="local")).kind == "embedded"
    named = _resolve(RayConfig(address="127.0.0.1:1234"))
    assert (named.kind, named.address, named.is_loopback) == ("existing", "127.0.0.1:1234", True)
    assert _resolve(RayConfig(address="ray://head:10001")).kind == "existing"


@pytest.mark.parametrize("address", ["auto", "http://127.0.0.1:8265"])
def test_a_ray_address_that_means_no_certain_cluster_is_refused(outside: pytest.MonkeyPatch, address: str) -> None:
    outside.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="host:port"):
        _resolve(RayConfig())


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port", "ftp://a:1"])
def test_an_address_that_cannot_be_one_is_refused(outside: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, local, host:port"):
        _resolve(RayConfig(address=address))


def test_nobody_at_the_address_is_a_bounded_wait() -> None:
    started = time.monotonic()
    with pytest.raises(ResourceTimeoutError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 within 1 s"):
        wait_for_cluster("127.0.0.1:9", timeout_s=1.0)
    assert time.monotonic() - started < 5


def test_something_else_at_the_address_is_a_bounded_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ResourceTimeoutError, match="did not answer as a Ray cluster within 1 s"):
            wait_for_cluster(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=1.0)
        assert time.monotonic() - started < 15


def test_resources_are_readable() -> None:
    resources = {"CPU": 4.0, "GPU": 0.5, "memory": 2.0 * 2**30, "node:127.0.0.1": 1.0}
    assert format_resources(resources) == "CPU 4, GPU 0.5, memory 2.0 GiB"
    assert format_resources({}) == "nothing"
