"""The same command lines as everywhere, on a cluster started from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT, SubmittedCluster
from tests.cluster.sockets import listening_outside_loopback

SESSION_IN_A_JOB = """
from pathlib import Path
import cluster
from cluster.config import RayConfig
from cluster.environment import base_folder
from cluster.ray_runtime import ray_session
import ray

def where():
    import cluster
    return cluster.__file__

with ray_session(RayConfig(start_timeout_s=30)) as session:
    print("kind", session.kind)
    print("address", session.address)
    print("same code", ray.get(ray.remote(where).remote(), timeout=60) == cluster.__file__)
    print("checkout", Path(cluster.__file__).parents[1])
    print("results", base_folder())
"""


def run_script(cluster: SubmittedCluster, folder: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(code)
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_submitted_job_prints_its_configuration(submitted_cluster: SubmittedCluster) -> None:
    done = submitted_cluster.submit(
        "python", "ray_job.py", "compact", "--config", "configs/tiny.yaml", "--corpus.paths", "[docs]", "--print_config"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "source: tiny" in done.stdout


def test_a_submitted_job_with_an_unknown_key_fails_and_says_why(submitted_cluster: SubmittedCluster) -> None:
    failed = submitted_cluster.submit("python", "ray_job.py", "compact", "--corpus.pathz", "docs")
    assert failed.returncode != 0
    assert "error: unknown key 'corpus.pathz'; did you mean 'corpus.paths'?" in failed.stdout + failed.stderr


def test_a_submitted_job_joins_its_cluster_with_its_own_code(submitted_cluster: SubmittedCluster) -> None:
    done = submitted_cluster.submit("python", "-c", SESSION_IN_A_JOB)
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "kind submitted" in output
    assert f"address {submitted_cluster.address}" in output
    assert "same code True" in output
    assert f"checkout {ROOT}\n" not in output, "the uploaded copy, not this folder"
    assert f"results {submitted_cluster.home}" in output


@pytest.mark.parametrize("way", ["address", "client_address"])
def test_an_existing_cluster_is_joined_by_address(
    submitted_cluster: SubmittedCluster, tmp_path: Path, way: str
) -> None:
    address = getattr(submitted_cluster, way)
    code = SESSION_IN_A_JOB.replace("RayConfig(", f"RayConfig(address={address!r}, ")
    done = run_script(submitted_cluster, tmp_path, code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kind existing" in done.stdout
    assert f"address {submitted_cluster.address}" in done.stdout
    assert "same code False" in done.stdout, "workers import the uploaded copy"
    assert submitted_cluster.process.is_running(), "who joins does not end it"


def test_a_wrong_token_is_refused_with_what_to_do(submitted_cluster: SubmittedCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    code = SESSION_IN_A_JOB.replace("RayConfig(", f"RayConfig(address={submitted_cluster.address!r}, ")
    refused = run_script(submitted_cluster, tmp_path, code, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert refused.returncode == 1
    last_line = refused.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"cluster.errors.ResourceError: the Ray cluster at {submitted_cluster.address} refused")
    assert "RAY_AUTH_TOKEN_PATH" in last_line


def test_the_cluster_listens_on_loopback_only(submitted_cluster: SubmittedCluster) -> None:
    processes = submitted_cluster.process.children(recursive=True)
    assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
    assert listening_outside_loopback(processes) == []


@pytest.mark.skipif(not psutil.LINUX, reason="looks at the environment of processes")
def test_every_process_is_under_the_one_that_is_stopped(submitted_cluster: SubmittedCluster) -> None:
    folder = submitted_cluster.environment["RAY_TMPDIR"]
    under = {process.pid for process in submitted_cluster.process.children(recursive=True)}
    of_this_cluster = set()
    for process in psutil.process_iter():
        try:
            if any(folder in word for word in process.cmdline()):
                of_this_cluster.add(process.pid)
        except psutil.Error:
            continue
    assert of_this_cluster
    assert of_this_cluster <= under
