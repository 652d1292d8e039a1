"""Bounded waits on Ray: whatever is waited for too long is an error that says what was asked for and what there is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

import cluster.errors
from cluster.errors import MegaContextError, ResourceError, ResourceTimeoutError
from cluster.ray_runtime import format_resources

CALL_TIMEOUT_S = 1800.0
"""Longest wait for one call of an actor; far above any honest one, so that a hang ends as an error."""

Resources = Mapping[str, float]
"""Ray's names: `CPU`, `GPU`, `memory` (bytes), or a custom one."""


def check_resources(requests: Sequence[Resources], what: str) -> None:
    """Refuse what the cluster, as it is now, could never give. Ray itself would wait for ever.

    Args:
        requests: one entry per actor or task that must run at the same time; each must fit on one node.
        what: what they are for, in the error's words.

    Raises:
        ResourceError: naming the request, the nodes and the totals.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for request in requests:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in request.items()) for node in nodes):
            listed = "; ".join(format_resources(node) for node in nodes) or "none"
            raise ResourceError(
                f"{what} asks for {format_resources(request)} on one node, and no node has that. "
                f"Nodes: {listed}. Ask for less, or start a larger cluster"
            )
    total: dict[str, float] = {}
    for request in requests:
        for name, amount in request.items():
            total[name] = total.get(name, 0.0) + amount
    cluster_total = ray.cluster_resources()
    if any(cluster_total.get(name, 0.0) < amount for name, amount in total.items()):
        raise ResourceError(
            f"{what} asks for {format_resources(total)} at the same time ({len(requests)} actors); the whole cluster "
            f"has {format_resources(cluster_total)}. Ask for less, or start a larger cluster"
        )


def largest_node_cpus() -> int:
    """CPUs of the node that has most of them, at least 1: what one process can use."""
    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))


def wait_for_actors(actors: Sequence[Any], requested: Resources, timeout_s: float, what: str = "actors") -> None:
    """Wait until every actor is placed and its constructor has returned.

    Args:
        actors: actor handles.
        requested: resources of each one, for the error.
        timeout_s: longest wait for all of them.
        what: what they are, in the error's words.

    Raises:
        ResourceTimeoutError: saying how many started, what was asked for and what is free.
        MegaContextError: what a constructor raised.
        ActorDiedError: a constructor failed in another way.
    """
    pending = [actor.__ray_ready__.remote() for actor in actors]
    ready, waiting = ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
    get_or_raise(ready, timeout_s, what)
    if waiting:
        raise ResourceTimeoutError(
            f"only {len(ready)} of {len(actors)} {what} started within {timeout_s:g} s; each asks for "
            f"{format_resources(requested)}. {_what_there_is()}"
        )


def get_or_raise(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` that does not wait for ever, and raises our own errors as the worker raised them.

    Args:
        refs: an object reference or a list of them.
        timeout_s: longest wait.
        what: what is waited for, in the error's words.

    Raises:
        ResourceTimeoutError: nothing came in time.
        MegaContextError: as raised in the worker, or in the constructor of its actor.
        RayError: anything else, as Ray raises it.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError as error:
        raise ResourceTimeoutError(f"{what} did not answer within {timeout_s:g} s. {_what_there_is()}") from error
    except (RayError, MegaContextError) as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from error


def own_error(error: BaseException) -> MegaContextError | None:
    """The `MegaContextError` at the bottom of what Ray raised, or None when there is none."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return own_error(cause)
    if isinstance(error, MegaContextError):
        return error
    return _from_constructor(str(error)) if isinstance(error, ActorDiedError) else None


def job_is_alive(job_id: str) -> bool:
    """Whether the cluster still has the driver of a Ray job (hexadecimal id)."""
    return any(job["JobID"] == job_id and not job["IsDead"] for job in state.jobs())


def num_restarts() -> int:
    """How often Ray has started this process's actor anew."""
    return int(state.actors(ray.get_runtime_context().get_actor_id())["NumRestarts"])


def _from_constructor(text: str) -> MegaContextError | None:
    """Ray keeps only the text of what a constructor raised; it ends in `module.Class: message`."""
    matches = list(re.finditer(r"^cluster\.errors\.(\w+): (.*)", text, re.MULTILINE | re.DOTALL))
    error_type = getattr(cluster.errors, matches[-1][1], None) if matches else None
    if not (isinstance(error_type, type) and issubclass(error_type, MegaContextError)):
        return None
    return error_type(matches[-1][2].strip())


def _what_there_is() -> str:
    free, total = format_resources(ray.available_resources()), format_resources(ray.cluster_resources())
    return f"Free now: {free}. The whole cluster: {total}"
