"""store start, status, stop: the service of a store, which writes its contexts for many jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError

from actors.service_client import (
    LASTING_CLUSTER,
    ServiceActors,
    actor_index,
    find_service,
    start_service,
    stop_service,
)
from cluster.config import RayConfig, StoreConfig
from cluster.errors import ConfigError, MegaContextError
from cluster.ray_runtime import RaySession, ray_session, would_embed
from cluster.service_config import StoreStartJob, StoreStatusJob, StoreStopJob
from cluster.tables import Table
from pipelines.tree_report import human_bytes
from pipelines.tree_versions import emit
from storage.store import STORE_FILE, Store


def start(job: StoreStartJob) -> None:
    """Start the actors, or what is missing of them, and show them."""
    with _lasting_cluster(job.ray, "store start") as session:
        service = start_service(job.store.root, job.actors, job.ray.resource_timeout_s)
        _show(service, job.store, session, as_json=job.json)


def status(job: StoreStatusJob) -> None:
    """Show actors and open contexts."""
    with _lasting_cluster(job.ray, "store status") as session:
        _show(find_service(job.store.root), job.store, session, as_json=job.json)


def stop(job: StoreStopJob) -> None:
    """Close the contexts, end the actors, wait until they are gone."""
    with _lasting_cluster(job.ray, "store stop"):
        closed = stop_service(job.store.root, job.timeout_s)
    rows = [{"stopped": name, "contexts closed": ", ".join(open_) or "none"} for name, open_ in sorted(closed.items())]
    emit(job.json, {"stopped": closed}, Table(rows, f"Service of store {job.store.root}"))


@contextmanager
def _lasting_cluster(config: RayConfig, command: str) -> Iterator[RaySession]:
    """The job's cluster, unless it would end with the job.

    Raises:
        ConfigError: it would, and so would the service.
    """
    if would_embed(config):
        raise ConfigError(f"`{command}` would start a Ray of its own, that ends with it. {LASTING_CLUSTER}")
    with ray_session(config) as session:
        yield session


def _show(service: ServiceActors | None, store: StoreConfig, session: RaySession, *, as_json: bool) -> None:
    descriptions = [] if service is None else [_described(service, index) for index in sorted(service.actors)]
    count = 0 if service is None else service.count
    open_contexts = [{**row, "actor": d["index"]} for d in descriptions for row in d.get("contexts", [])]
    names = [] if not (store.root / STORE_FILE).exists() else [info.name for info in Store(store.root).contexts()]
    report = {
        "root": str(store.root),
        "cluster": session.address,
        "running": count > 0 and all(not d["problem"] for d in descriptions) and len(descriptions) == count,
        "num_actors": count,
        "actors": descriptions,
        "placement": {name: actor_index(name, count) for name in names} if count else {},
    }
    emit(
        as_json,
        report,
        Table([_actor_row(d, count, names) for d in descriptions], f"Service of store {store.root}"),
        Table([_context_row(row) for row in open_contexts], "Contexts that are open for jobs"),
    )


def _described(service: ServiceActors, index: int) -> dict[str, Any]:
    """What an actor says of itself, and what is wrong with it; empty when nothing is."""
    try:
        description = service.describe(index)
    except (RayError, MegaContextError) as error:
        return {"index": index, "problem": f"does not answer: {error}"}
    try:
        service.verify(description)
    except MegaContextError as error:
        return {**description, "problem": str(error)}
    return {**description, "problem": ""}


def _actor_row(description: dict[str, Any], count: int, names: list[str]) -> dict[str, Any]:
    index = description["index"]
    return {
        "actor": f"{index} of {count}",
        "node": description.get("node_ip", ""),
        "pid": str(description.get("pid", "")),
        "code": description.get("code_version", ""),
        "format": str(description.get("format_version", "")),
        "since": _when(description.get("started_at")),
        "restarts": description.get("num_restarts"),
        "open": len(description.get("contexts", [])),
        "contexts": sum(actor_index(name, count) == index for name in names),
        "state": description["problem"] or "serves",
    }


def _context_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["busy"] or "version" not in row:
        return {"context": row["context"], "actor": str(row["actor"]), "for": row["held_by"], "state": _state(row)}
    return {
        "context": row["context"],
        "actor": str(row["actor"]),
        "for": row["held_by"],
        "branch": row["branch"],
        "version": str(row["version"]),
        "tokens": row["num_tokens"],
        "epoch": str(row["epoch"]),
        "journal": human_bytes(row["journal_bytes"]),
        "last commit": _when(row["committed_at"]),
        "state": _state(row),
    }


def _state(row: dict[str, Any]) -> str:
    return "in the middle of a call" if row["busy"] else row.get("problem") or "open"


def _when(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
