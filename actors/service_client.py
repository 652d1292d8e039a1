"""Finding, verifying and calling the service of a store; starting and stopping it.

Its actors are known by name: of the store's real path, so that a service of another store in the same place is found
and told apart by the store's id.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.store_service import SERVED_METHODS, Claim, StoreService, service_facts
from actors.tree_store import TreeStoreSpec
from cluster.config import RayConfig, StoreConfig, require
from cluster.errors import MegaContextError, ResourceError, ResourceTimeoutError, ServiceMismatchError
from cluster.ray_calls import get_or_raise, wait_for_actors
from cluster.ray_runtime import NAMESPACE, would_embed
from storage.store import Store
from storage.tree.writer_lock import committed_epoch

logger = logging.getLogger("megacontext.storage")

DESCRIBE_TIMEOUT_S = 30.0
"""Longest wait for an actor to say what it is; Ray restarts a dead one within a few seconds."""

LOOKS = "looks"
"""Concurrency group of `describe`, which must not wait for a long seal."""

LASTING_CLUSTER = (
    "A service needs a cluster that lasts; one on this machine, on loopback: `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray "
    "start --head --node-ip-address 127.0.0.1 --disable-usage-stats`, then give every job `--ray.address "
    "127.0.0.1:6379` (or set RAY_ADDRESS)"
)
"""What to do where there is none."""

_NAME = re.compile(r"megacontext-store-(?P<path>[0-9a-f]{16})-(?P<index>\d+)-of-(?P<count>\d+)")

_WHAT_TO_DO = "Run `store stop`, then `store start`, or write without it: --store.service off"


def actor_index(context: str, num_actors: int) -> int:
    """Which actor of a service has a context: by name alone, and with another number of actors few change place.

    Rendezvous hashing (Thaler and Ravishankar, 1998): the actor whose hash with the name is the highest.
    """
    return max(range(num_actors), key=lambda index: hashlib.sha256(f"{index}:{context}".encode()).digest())


def _name(root: Path, index: int, count: int) -> str:
    return f"megacontext-store-{_path_digest(root)}-{index}-of-{count}"


def _path_digest(root: Path) -> str:
    return hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ServiceActors:
    """The actors of a store's service by index; not yet verified."""

    root: Path
    actors: Mapping[int, Any]
    count: int
    """How many there should be."""

    def describe(self, index: int, timeout_s: float = DESCRIBE_TIMEOUT_S) -> dict[str, Any]:
        """What an actor says of itself (`StoreService.describe`)."""
        ref = self.actors[index].describe.options(concurrency_group=LOOKS).remote()
        return get_or_raise(ref, timeout_s, f"actor {index} of the service of store {self.root}")

    def verify(self, description: Mapping[str, Any]) -> None:
        """Refuse an actor that is not of this store, this code and this format.

        Raises:
            ServiceMismatchError: naming everything that differs.
        """
        facts = service_facts(self.root)
        different = [
            f"{name.replace('_', ' ')}: the service has {description.get(name)!r}, this job {value!r}"
            for name, value in facts.items()
            if description.get(name) != value
        ]
        if different:
            raise ServiceMismatchError(
                f"the running service of store {self.root} is not the one this job needs; {'; '.join(different)}. "
                f"{_WHAT_TO_DO}"
            )


def find_service(root: Path) -> ServiceActors | None:
    """The service of a store on the cluster this process has joined; None when there is none.

    Raises:
        ServiceMismatchError: services of different sizes, left by a `store stop` that did not come to its end.
    """
    found = _names(root)
    if not found:
        return None
    counts = {int(match["count"]) for match in found}
    if len(counts) > 1:
        raise ServiceMismatchError(
            f"store {root} has services of {' and '.join(map(str, sorted(counts)))} actors at once. {_WHAT_TO_DO}"
        )
    handles = _handles(found)
    actors = {int(match["index"]): handles[match.string] for match in found if match.string in handles}
    return ServiceActors(root, actors, counts.pop()) if actors else None


def _names(root: Path) -> list[re.Match[str]]:
    """Names of the actors of a store's service that the cluster has."""
    entries: Any = ray.util.list_named_actors(all_namespaces=True)
    matches = (_NAME.fullmatch(entry["name"]) for entry in entries if entry["namespace"] == NAMESPACE)
    return [match for match in matches if match is not None and match["path"] == _path_digest(root)]


def _handles(names: Sequence[re.Match[str]]) -> dict[str, Any]:
    handles = {}
    for match in names:
        with contextlib.suppress(ValueError):  # it ended meanwhile
            handles[match.string] = ray.get_actor(match.string, namespace=NAMESPACE)
    return handles


# -- writing through it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServedContext:
    """A context of a service, called like the actor of a store of its own: `served.append.remote(epoch, spans)`.

    Travels to other processes of the job, which call under the same claim.
    """

    actor: Any
    spec: TreeStoreSpec
    claim: Claim

    def __getattr__(self, method: str) -> Any:
        if method not in SERVED_METHODS and method not in {"open", "close"}:
            raise AttributeError(method)
        return _ServedMethod(self, method)


@dataclass(frozen=True)
class _ServedMethod:
    served: ServedContext
    method: str

    def remote(self, *arguments: Any) -> Any:
        """Reference to the result; references among the arguments are followed by Ray."""
        actor, claim = self.served.actor, self.served.claim
        if self.method == "open":
            return actor.attach.remote(claim, self.served.spec)
        if self.method == "close":
            return actor.detach.remote(claim.context, claim.token)
        return actor.call.remote(claim.context, claim.token, self.method, *arguments)


def served_context(spec: TreeStoreSpec) -> ServedContext | None:
    """The context as the store's verified service has it, to be opened; None when this job opens it itself.

    Raises:
        ResourceError, ServiceMismatchError: as `verified_actor`.
    """
    actor = verified_actor(spec.store)
    if actor is None:
        return None
    claim = Claim(spec.store.context, uuid.uuid4().hex, ray.get_runtime_context().get_job_id(), spec.owner)
    return ServedContext(actor, spec, claim)


def verified_actor(store: StoreConfig) -> Any | None:
    """The actor of a store's service that has `store.context`; None when this job is to open the context itself.

    Raises:
        ResourceError: `store.service` is `require`, and there is none.
        ServiceMismatchError: there is one, and it is not the right one.
    """
    use, root = store.service, store.root
    service = None if use == "off" else find_service(root)
    if service is None:
        if use == "require":
            raise ResourceError(
                f"store.service=require, and no service of store {root} runs on this cluster; run `store start` with "
                "the same --store.root and --ray.address"
            )
        return None
    index = actor_index(store.context, service.count)
    if index not in service.actors:
        raise ServiceMismatchError(
            f"the service of store {root} lacks actor {index} of {service.count}. Run `store start` again: it starts "
            "what is missing"
        )
    service.verify(service.describe(index))
    return service.actors[index]


def check_service_use(store: StoreConfig, config: RayConfig) -> None:
    """Before anything is started: a job that requires a service needs a cluster that can have one.

    Raises:
        ConfigError: its cluster would be one of its own.
    """
    require(
        store.service != "require" or not would_embed(config),
        f"store.service=require, and this job would start a Ray of its own, where no service is. {LASTING_CLUSTER}",
    )


def check_epoch(spec: TreeStoreSpec, epoch: int) -> None:
    """Refuse a service whose epoch this machine does not find in the catalogue: it writes on another disk.

    Raises:
        ServiceMismatchError: with both numbers.
    """
    found = committed_epoch(Store(spec.store.root).folder(spec.store.context))
    if found != epoch:
        raise ServiceMismatchError(
            f"epoch: the service of store {spec.store.root} writes context {spec.store.context!r} under epoch {epoch}, "
            f"its catalogue here has {found}. The service sees another disk under this path, or another writer took "
            f"over. {_WHAT_TO_DO}"
        )


# -- starting and stopping -------------------------------------------------------------------------------------------


def start_service(root: Path, num_actors: int, timeout_s: float) -> ServiceActors:
    """Start the actors that are missing, on this machine; those there are verified.

    Raises:
        ServiceMismatchError: a service runs that is not the right one, or of another size.
        ResourceTimeoutError: Ray gave no processes in time.
    """
    Store(root, create=True)
    running = find_service(root)
    if running is not None and running.count != num_actors:
        raise ServiceMismatchError(
            f"the service of store {root} runs with {running.count} actors, not {num_actors}: contexts would change "
            "place. Run `store stop` first, or ask for as many"
        )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray's stubs do not know that its decorator takes a class later.
    remote: Any = ray.remote(concurrency_groups={LOOKS: 1})  # pyright: ignore[reportCallIssue, reportArgumentType]
    actors = {
        index: remote(StoreService)
        .options(
            name=_name(root, index, num_actors),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=here,
        )
        .remote(root, index, num_actors)
        for index in range(num_actors)
    }
    wait_for_actors(list(actors.values()), {"CPU": 0}, timeout_s, "actors of the store's service")
    service = ServiceActors(root, actors, num_actors)
    for index in actors:
        service.verify(service.describe(index))
    return service


def stop_service(root: Path, timeout_s: float) -> dict[str, list[str]]:
    """Close every context and end the actors, whatever code they run and whether or not the store is still there.

    Args:
        root: the store's folder.
        timeout_s: longest wait for an actor to close its contexts; then it is ended all the same.

    Returns:
        The contexts that were open, by the actor's name.

    Raises:
        ResourceTimeoutError: an actor did not go.
    """
    closed: dict[str, list[str]] = {}
    handles = _handles(_names(root))
    refs = {name: (handle.stop.remote(), handle.process_id.remote()) for name, handle in handles.items()}
    pids: list[int] = []
    for name, (stopped, pid) in refs.items():
        try:
            closed[name] = get_or_raise(stopped, timeout_s, f"closing the contexts of {name}")
            node, number = get_or_raise(pid, timeout_s, f"asking {name} for its process id")
            pids += [number] * (node == ray.get_runtime_context().get_node_id())
        except (RayError, MegaContextError) as error:
            closed.setdefault(name, [])
            logger.warning("%s did not close in order (%s); what it acknowledged is safe", name, error)
    for handle in handles.values():
        ray.kill(handle, no_restart=True)
    _wait_until_gone(root, pids)
    return closed


def _wait_until_gone(root: Path, pids: Sequence[int]) -> None:
    deadline = time.monotonic() + DESCRIBE_TIMEOUT_S
    while True:
        there = [match.string for match in _names(root)]
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        if not there and not alive:
            return
        if time.monotonic() > deadline:
            left = ", ".join(sorted(there)) or f"processes {alive}"
            raise ResourceTimeoutError(f"{left} did not end within {DESCRIBE_TIMEOUT_S:g} s; run `store stop` again")
        time.sleep(0.1)
