"""A cluster started from outside, as the README says, to which jobs are submitted."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class SubmittedCluster:
    """A running head node with token authentication, on loopback."""

    address: str
    """`host:port` of the control store, for RAY_ADDRESS and `ray.address`."""

    client_address: str
    """`ray://host:port` of its Ray Client server."""

    dashboard: str
    """URL that jobs are submitted to."""

    environment: dict[str, str]
    """What the cluster was started with: token, home of results, virtual environment."""

    home: Path
    """Where submitted jobs leave what they write by relative paths."""

    process: psutil.Process
    """The `ray start --block` all the others are children of."""

    def submit(self, *entrypoint: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- <entrypoint>`, and wait for its end."""
        command = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )


@pytest.fixture(scope="session")
def submitted_cluster() -> Iterator[SubmittedCluster]:
    """Start a head node of its own folder, ports and token; stop exactly its processes."""
    folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # short: paths of Unix sockets are limited
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # as an activated environment
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
        "MEGACONTEXT_HOME": str(folder / "home"),
    }
    port, dashboard, client, agent = _free_ports(4)
    command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "4"]
    command += ["--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    command += ["--object-store-memory", str(150 * 2**20), "--disable-usage-stats"]
    output = folder / "start.log"
    with output.open("w") as log:
        head = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    process = psutil.Process(head.pid)
    try:
        _wait_for_dashboard(f"http://127.0.0.1:{dashboard}/api/version", token.read_text(), head, output)
        yield SubmittedCluster(
            address=f"127.0.0.1:{port}",
            client_address=f"ray://127.0.0.1:{client}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            environment=environment,
            home=folder / "home",
            process=process,
        )
    finally:
        # Not `ray stop`, which stops every Ray of the machine.
        ours = process.children(recursive=True) if process.is_running() else []
        head.terminate()
        _, alive = psutil.wait_procs(ours, timeout=10)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        head.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_dashboard(url: str, token: str, head: subprocess.Popen[bytes], output: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if head.poll() is not None or refused or time.monotonic() > deadline:
                pytest.fail(f"the cluster did not start: {error}\n{output.read_text()}")
            time.sleep(0.25)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports
