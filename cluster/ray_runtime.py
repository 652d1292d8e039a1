"""The one place that starts or joins a Ray cluster.

Three cases behind one `ray_session`: an embedded cluster of our own (the default), a running one by address,
or the one whose `ray job submit` started this process. It is never whichever cluster was started last on
this machine, which is what a bare `ray.init()` takes.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.config import RayConfig
from cluster.environment import PROJECT_ROOT, in_submitted_job, quiet_environment
from cluster.errors import ConfigError, MegaContextError, ResourceError, ResourceTimeoutError
from cluster.log import get_logger, quiet_libraries

quiet_environment()  # before Ray is imported: it reads some of this at import

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402

NAMESPACE = "megacontext"
"""Ray namespace of all jobs, so that they find each other's named actors."""

Kind = Literal["embedded", "existing", "submitted", "shared"]

log = get_logger("ray")


@dataclass(frozen=True)
class RaySession:
    """The cluster a job runs on."""

    kind: Kind
    """`embedded`: ours, ends with the session. `existing`, `submitted`: joined. `shared`: this process had
    already started or joined it, and whoever did so ends it."""

    address: str
    """`host:port` of its control store."""

    node_ip: str
    """Address of the node this process is on."""

    resources: dict[str, float]
    """All the resources of the cluster, not only what is free."""

    def describe(self) -> str:
        """One line for the log."""
        return f"Ray: {self.kind} cluster at {self.address} with {format_resources(self.resources)}"


@dataclass(frozen=True)
class _Target:
    kind: Kind
    address: str  # empty for an embedded cluster

    @property
    def is_loopback(self) -> bool:
        return self.kind == "embedded" or _is_loopback(urlsplit(_with_scheme(self.address)).hostname or "")


@contextmanager
def ray_session(config: RayConfig) -> Iterator[RaySession]:
    """Start or join the cluster that `config.address` means, and leave it as it was found.

    Raises:
        ConfigError: an address that cannot be one.
        ResourceTimeoutError: nothing answered within `config.start_timeout_s`.
        ResourceError: the cluster refused us (token, version), or an embedded one could not start.
    """
    if ray.is_initialized():
        yield _describe_current("shared")
        return
    target = _resolve(config)
    if target.is_loopback:
        # Without this Ray turns 127.0.0.1 into the machine's own address and opens its ports there.
        # The constant is read when Ray is imported, which may have been before.
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
    if target.kind == "embedded":
        with _embedded(config) as session:
            yield session
        return
    if target.kind == "existing":
        wait_for_cluster(target.address, config.start_timeout_s)
    try:
        _init(address=target.address, runtime_env=_runtime_env(target))
        session = _describe_current(target.kind)
        log.info(session.describe())
        yield session
    finally:
        ray.shutdown()


def would_embed(config: RayConfig) -> bool:
    """Whether a job's cluster would be one of its own, that ends with it.

    Raises:
        ConfigError: an address that cannot be one.
    """
    return not ray.is_initialized() and _resolve(config).kind == "embedded"


def wait_for_cluster(address: str, timeout_s: float) -> None:
    """Wait until a Ray cluster answers at an address.

    `ray.init` itself keeps trying for minutes, also at a port that belongs to something else.

    Raises:
        ResourceTimeoutError: nothing listens, or what listens is no Ray that answers, within `timeout_s`.
        ResourceError: it answered and refused us; holds its words.
    """
    deadline = time.monotonic() + timeout_s
    parts = urlsplit(_with_scheme(address))
    while True:
        try:
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=min(timeout_s, 5.0)).close()
            break
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise ResourceTimeoutError(
                    f"no Ray cluster answers at {address} within {timeout_s:g} s ({error}); start one as the README "
                    "says, correct ray.address (or RAY_ADDRESS), or take --ray.address local"
                ) from error
            time.sleep(0.5)
    if parts.scheme == "ray":
        return  # Ray Client answers or fails within its own 30 s
    # In a process of its own, because Ray's client cannot be interrupted while it tries to connect.
    environment = os.environ | {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: str(int(ray_constants.ENABLE_RAY_CLUSTER))}
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    remaining_s = max(5.0, deadline - time.monotonic())
    try:
        probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=remaining_s)
    except subprocess.TimeoutExpired as error:
        raise ResourceTimeoutError(
            f"something listens at {address} but did not answer as a Ray cluster within {timeout_s:g} s; "
            "is it the port of the control store (6379 by default), not that of the dashboard?"
        ) from error
    if probe.returncode != 0:
        last_words = (probe.stderr.strip() or probe.stdout.strip() or "no reason given").splitlines()[-1]
        raise ResourceError(
            f"the Ray cluster at {address} refused us: {last_words}. Its RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH, "
            "and its versions of Ray and Python, must be those of this process"
        )


def format_resources(resources: Mapping[str, float]) -> str:
    """`CPU 4, GPU 1, memory 8.0 GiB` from Ray's resource table; node labels are left out."""
    parts = []
    for name in sorted(name for name in resources if not name.startswith("node:")):
        amount = resources[name]
        in_bytes = name in {"memory", "object_store_memory"}
        parts.append(f"{name} {amount / 2**30:.1f} GiB" if in_bytes else f"{name} {amount:g}")
    return ", ".join(parts) or "nothing"


def _resolve(config: RayConfig) -> _Target:
    address = config.address
    kind: Kind = "existing"
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "") or "local"
        kind = "submitted" if in_submitted_job() else "existing"
        if address == "auto":
            raise ConfigError(
                "RAY_ADDRESS=auto would join whichever cluster was started last on this machine; "
                "set it to host:port, or unset it for an embedded cluster"
            )
    if address == "local":
        return _Target("embedded", "")
    parts = urlsplit(_with_scheme(address))
    if parts.scheme in {"http", "https"}:
        raise ConfigError(
            f"{address} is the address of a dashboard, for `ray job submit`; a cluster is joined by host:port"
        )
    try:
        usable = parts.scheme in {"gcs", "ray"} and parts.hostname and parts.port
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"ray.address={address!r} must be auto, local, host:port or ray://host:port")
    return _Target(kind, address)


@contextmanager
def _embedded(config: RayConfig) -> Iterator[RaySession]:
    # A short folder: paths of Unix sockets may have no more than 107 bytes. Of our own: Ray notes the address of
    # the newest cluster in the common one, and other programs would join ours.
    parent = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mc-ray-", dir=parent))
    asked = f"{config.num_cpus or 'all'} CPUs, {config.object_store_memory_mb} MiB of object store"
    keep_logs = False
    try:
        with _private_token(folder), _environment({"PYTHONPATH": _with_project_root(os.environ.get("PYTHONPATH", ""))}):
            try:
                _init(
                    address="local",
                    num_cpus=config.num_cpus or None,
                    object_store_memory=config.object_store_memory_mb * 2**20,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder / "r"),  # one below: Ray opens it to every user of the machine
                    runtime_env=_QUIET_WORKERS,
                )
                _wait_for_first_node(config.start_timeout_s, asked)
                session = _describe_current("embedded")
                log.info(session.describe())
                yield session
            finally:
                ray.shutdown()
    except Exception as error:
        keep_logs = not isinstance(error, MegaContextError)  # our own errors explain themselves
        raise
    finally:
        if keep_logs:
            log.warning("the logs of Ray and of its workers are kept in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _init(**arguments: Any) -> None:
    try:
        ray.init(namespace=NAMESPACE, logging_level=logging.ERROR, **arguments)
    except Exception as error:  # Ray raises many types here; all mean that there is no cluster to work on
        asked = {key: value for key, value in arguments.items() if value is not None and not key.startswith("_")}
        raise ResourceError(f"Ray did not start or let us in: {error} (asked for {asked})") from error


def _wait_for_first_node(timeout_s: float, asked: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not ray.cluster_resources().get("CPU"):
        if time.monotonic() > deadline:
            raise ResourceTimeoutError(f"the embedded cluster had no CPUs within {timeout_s:g} s; asked for {asked}")
        time.sleep(0.1)


def _describe_current(kind: Kind) -> RaySession:
    return RaySession(
        kind=kind,
        address=ray.get_runtime_context().gcs_address,
        node_ip=ray.util.get_node_ip_address(),
        resources=dict(ray.cluster_resources()),
    )


_QUIET_WORKERS = {"worker_process_setup_hook": "cluster.ray_runtime.prepare_worker"}


def prepare_worker() -> None:
    """Called by Ray in every worker process of a cluster we start or join."""
    quiet_libraries()
    # Asks every few seconds for a part of the dashboard that embedded clusters do not have.
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)
    # Parts of Ray Train look for the cluster by themselves, and fail where a machine has several.
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def _runtime_env(target: _Target) -> dict[str, Any] | None:
    """What a joined cluster's workers need to import our packages; a submitted job brought its folder itself."""
    is_checkout = (PROJECT_ROOT / "pyproject.toml").is_file()
    return {"working_dir": str(PROJECT_ROOT), **_QUIET_WORKERS} if target.kind == "existing" and is_checkout else None


@contextmanager
def _private_token(folder: Path) -> Iterator[None]:
    """A token for this cluster only.

    Ray would write one to `~/.ray/auth_token`, and from then on every `ray start` of this user would ask for it.
    """
    if "RAY_AUTH_MODE" in os.environ:  # the user decided
        yield
        return
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with _environment({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token)}):
        _forget_token()
        yield
    _forget_token()


def _forget_token() -> None:
    """Ray caches the first token it reads for the life of the process; the next cluster has another one."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Set (or with None, unset) variables, and put them back afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set_environment(changes)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _with_project_root(python_path: str) -> str:
    return os.pathsep.join(filter(None, [str(PROJECT_ROOT), python_path]))


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"gcs://{address}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
