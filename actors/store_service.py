"""The service of a store: detached actors, each the one writer of the contexts that fall to it by name.

A job attaches to a context and writes through the actor as it would through a store actor of its own. The context is
open while a job is attached; between jobs nobody holds its lock. A job that dies without a word is noticed by its Ray
job id.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.curation.work import WORK
from actors.tree_store import TreeStore, TreeStoreSpec
from cluster.environment import PROJECT_ROOT
from cluster.errors import MegaContextError, StoreRestartedError, WriterConflictError
from cluster.provenance import package_versions
from cluster.ray_calls import job_is_alive, num_restarts
from storage.contract import Version
from storage.schema import FORMAT_VERSION
from storage.store import Store

logger = logging.getLogger("megacontext.storage")

SWEEP_S = 5.0
"""Between two looks for jobs that died while they were attached."""

LOOK_WAIT_S = 2.0
"""How long `describe` waits for a context whose call is under way."""

SERVED_METHODS = frozenset(
    {
        "activate_rebuild",
        "append",
        "append_table",
        "append_tail",
        "begin_rebuild",
        "close_document",
        "flush",
        "marks",
        "open_document",
        "process_id",
        "put_nodes",
        "put_spans",
        "status",
    }
)
"""What an attached job may call of its `TreeStore`; opening and closing are attaching and detaching."""

_CODE = (
    "storage/**/*.py",
    "actors/store_service.py",
    "actors/tree_store.py",
    "actors/rows.py",
    "actors/curation/work.py",
    "actors/curation/plan.py",
    "cluster/config.py",
)


@functools.cache
def code_version() -> str:
    """The package's version, and a digest of the sources that decide what is written and what passes by calls.

    Files, not the git revision: a cluster's workers run from a copy without `.git`, and other changes do not matter.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _CODE for path in PROJECT_ROOT.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PROJECT_ROOT)} {len(content)}\n".encode() + content)
    return f"{package_versions()['megacontext']}+{digest.hexdigest()[:16]}"


def service_facts(root: Path) -> dict[str, Any]:
    """What a job and a service must agree on, as each of them sees it."""
    return {
        "root": os.path.realpath(root),
        "store_id": Store(root).store_id(),
        "code_version": code_version(),
        "format_version": FORMAT_VERSION,
    }


@dataclass(frozen=True)
class Claim:
    """One job's right to write a context."""

    context: str
    token: str
    """New with every attaching: what was lost with a process is never taken for what came after."""
    job_id: str
    """Of Ray, hexadecimal."""
    owner: str


@dataclass
class _Held:
    """A context that is open for a job."""

    claim: Claim
    tree: TreeStore
    since: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of the calls to `tree`, which takes one at a time."""
    released: bool = False


class StoreService:
    """Hosts the `TreeStore` of every attached context. Plain class; a detached actor of one call at a time hosts it,
    with `describe` in a concurrency group of its own."""

    def __init__(self, root: Path, index: int, num_actors: int, is_alive: Callable[[str], bool] = job_is_alive) -> None:
        """Serve a store that exists.

        Args:
            root: its folder.
            index: of this actor.
            num_actors: of the service.
            is_alive: whether a Ray job lives.

        Raises:
            ContextNotFoundError: there is no store.
        """
        self._root = root
        # As they were at the start: code and store may be replaced under a running process.
        self._facts = {**service_facts(root), "index": index, "num_actors": num_actors, "started_at": time.time()}
        self._is_alive = is_alive
        self._held: dict[str, _Held] = {}
        self._stopping = False
        threading.Thread(target=self._sweep_for_ever, name="sweep", daemon=True).start()

    def attach(self, claim: Claim, spec: TreeStoreSpec) -> tuple[Version, int]:
        """Open a context for a job; the newest version, and the epoch to write under.

        Raises:
            WriterConflictError: another live job has it here, or another process elsewhere.
            StoreRestartedError: the service is being stopped.
            IncompatibleTreeError, CorruptTreeError: see `Store.open_writer`.
        """
        if self._stopping:
            raise StoreRestartedError(f"the service of store {self._root} is being stopped")
        held = self._held.get(claim.context)
        if held is not None:
            self._refuse_or_release(held)
        spec = replace(spec, store=replace(spec.store, root=self._root))
        tree = TreeStore(spec)
        opened = tree.open()
        self._held[claim.context] = _Held(claim, tree, time.time())
        return opened

    def _refuse_or_release(self, held: _Held) -> None:
        claim = held.claim
        if not held.released and self._is_alive(claim.job_id):
            raise WriterConflictError(
                f"context {claim.context!r} is being written by {claim.owner or 'another job'} through the store's "
                f"service since {time.strftime('%H:%M:%S', time.localtime(held.since))}. A context has one writer: "
                "wait for that job, stop it, or write to another context with --store.context."
            )
        self._release(held)

    def call(self, context: str, token: str, method: str, *arguments: Any) -> Any:
        """One of `SERVED_METHODS` of an attached context's `TreeStore`. Errors as there.

        Raises:
            StoreRestartedError: the claim is not, or no longer, known here.
        """
        if method not in SERVED_METHODS:
            raise AttributeError(f"{method} is not served")
        held = self._claimed(context, token)
        if held is not None:
            with held.lock:
                if not held.released:
                    return getattr(held.tree, method)(*arguments)
        raise StoreRestartedError(
            f"the store's service does not hold context {context!r} for this job any more: it was restarted or stopped"
        )

    def curate(self, context: str, branch: str, owner: str, work: str, *arguments: Any) -> Any:
        """A piece of curation's work (`actors.curation.work.WORK`) on a branch of a context, between the calls of the
        job that has it open, if there is one.

        Raises:
            WriterConflictError: that job writes another branch or rebuilds gists, or a process elsewhere is the writer.
            StoreRestartedError: the service is being stopped.
            MegaContextError: as the piece says.
        """
        if self._stopping:
            raise StoreRestartedError(f"the service of store {self._root} is being stopped")
        store = Store(self._root)
        held = self._held.get(context)
        if held is not None:
            with held.lock:
                if not held.released:
                    return WORK[work](store, held.tree.lent(branch), *arguments)
        with store.open_maintenance(context, branch, owner) as writer:
            return WORK[work](store, writer, *arguments)

    def detach(self, context: str, token: str) -> None:
        """Flush and close a context; a claim that is not known is let go already.

        Raises:
            StorageError: what flushing met; what was acknowledged is safe.
        """
        held = self._claimed(context, token)
        if held is not None:
            self._release(held)

    def _claimed(self, context: str, token: str) -> _Held | None:
        held = self._held.get(context)
        return held if held is not None and held.claim.token == token else None

    def _release(self, held: _Held) -> None:
        """Close a context, once, whoever comes first: its job, the next one, or the sweep."""
        with held.lock:
            if held.released:
                return
            held.released = True
            try:
                held.tree.close()
            finally:
                if self._held.get(held.claim.context) is held:
                    del self._held[held.claim.context]

    def sweep(self) -> int:
        """Close the contexts of jobs that died; returns how many."""
        dead = [held for held in list(self._held.values()) if not self._is_alive(held.claim.job_id)]
        for held in dead:
            logger.warning("%s died; context %s is closed", held.claim.owner or "a job", held.claim.context)
            self._release(held)
        return len(dead)

    def _sweep_for_ever(self) -> None:
        while True:
            time.sleep(SWEEP_S)
            try:
                if self._held:
                    self.sweep()
            except Exception:  # the next look, or the next job, tries again
                logger.exception("looking for jobs that died")

    def describe(self) -> dict[str, Any]:
        """This actor and its open contexts, in plain values: other versions of the code read them, too."""
        context = ray.get_runtime_context() if ray.is_initialized() else None
        return {
            **self._facts,
            "pid": os.getpid(),
            "node_ip": ray.util.get_node_ip_address() if context else "",
            "node_id": context.get_node_id() if context else "",
            "num_restarts": num_restarts() if context and context.get_actor_id() else 0,
            "contexts": [_describe(held) for held in sorted(self._held.values(), key=lambda h: h.claim.context)],
        }

    def process_id(self) -> tuple[str, int]:
        """Node and process of this actor."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def stop(self) -> list[str]:
        """Take no job any more, close what is open; the names of the contexts that were."""
        self._stopping = True
        closed = []
        problems: list[MegaContextError] = []
        for held in list(self._held.values()):
            closed.append(held.claim.context)
            try:
                self._release(held)
            except MegaContextError as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return closed


def _describe(held: _Held) -> dict[str, Any]:
    row: dict[str, Any] = {"context": held.claim.context, "held_by": held.claim.owner, "since": held.since}
    if not held.lock.acquire(timeout=LOOK_WAIT_S):
        return row | {"busy": True}
    try:
        if held.released:
            return row | {"busy": True}
        status = held.tree.status()
    except MegaContextError as error:
        return row | {"busy": False, "problem": str(error)}
    finally:
        held.lock.release()
    return row | {
        "busy": False,
        "branch": status.version.branch,
        "version": status.version.seq,
        "num_tokens": status.version.num_tokens,
        "epoch": status.epoch,
        "journal_bytes": status.journal_bytes,
        "committed_at": status.committed_at,
        "commits": status.num_commits,
        "commit_ms_p50": status.commit_ms_p50,
        "commit_ms_p99": status.commit_ms_p99,
        "problem": status.waiting_seal,
    }
