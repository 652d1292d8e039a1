"""Who does curation's work: this process, as the context's writer for as long as one piece takes, or the actor of the
store's service that has the context, between the calls of the job that writes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from actors.curation.work import WORK
from actors.service_client import check_service_use, verified_actor
from cluster.config import RayConfig, StoreConfig
from cluster.errors import WriterConflictError
from cluster.ray_calls import CALL_TIMEOUT_S, get_or_raise
from cluster.ray_runtime import ray_session, would_embed
from storage.store import Store

RETRY_S = 0.5
"""Between attempts to become the writer."""


class Curator:
    """Does one piece of `work.WORK` after the other on a branch of a context, which it opens for each."""

    def __init__(
        self, store: StoreConfig, owner: str, wait_s: float, on_wait: Callable[[float], None] | None = None
    ) -> None:
        """Work on `store.context`, branch `store.version`.

        Args:
            store: where the context is.
            owner: who writes, for those who are refused meanwhile.
            wait_s: how long each piece may wait for another writer.
            on_wait: is told when one waits, for how long at most.
        """
        self.store = store
        self.owner = owner
        self.waited_s = 0.0
        """For other writers, by all pieces."""
        self._wait_s = wait_s
        self._on_wait = on_wait

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a piece of work returns.

        Raises:
            WriterConflictError: somebody else was the writer for all of `wait_s`.
            MegaContextError: as the piece says.
        """
        begun = tried = time.monotonic()
        while True:
            try:
                done = self._try(work.__name__, arguments)
            except WriterConflictError:
                if time.monotonic() - begun >= self._wait_s:
                    raise
                if self._on_wait is not None and tried == begun:
                    self._on_wait(self._wait_s)
                time.sleep(min(RETRY_S, self._wait_s))
                tried = time.monotonic()
            else:
                self.waited_s += tried - begun
                return done

    def _try(self, work: str, arguments: tuple[Any, ...]) -> Any:
        """The piece of work, if nobody else is the writer now."""
        store = Store(self.store.root)
        with store.open_maintenance(self.store.context, self.store.version, self.owner) as writer:
            return WORK[work](store, writer, *arguments)


class SharedCurator(Curator):
    """Has the store's service do it, where one runs on this process's cluster. It is looked for anew for every piece: a
    job of days outlives services."""

    def _try(self, work: str, arguments: tuple[Any, ...]) -> Any:
        actor = verified_actor(self.store)
        if actor is None:
            return super()._try(work, arguments)
        ref = actor.curate.remote(self.store.context, self.store.version, self.owner, work, *arguments)
        return get_or_raise(ref, CALL_TIMEOUT_S, f"curating context {self.store.context!r}")


@contextlib.contextmanager
def curating(
    store: StoreConfig,
    ray_config: RayConfig,
    owner: str,
    wait_s: float,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[Curator]:
    """Who works on a context: the store's service, where one runs on the cluster of `ray_config`, else this process.

    No cluster is started for it.

    Raises:
        ConfigError, ResourceError: `store.service` is `require`, and none runs.
        ServiceMismatchError: one runs that is of another store, code or format.
    """
    check_service_use(store, ray_config)
    if store.service == "off" or would_embed(ray_config):
        yield Curator(store, owner, wait_s, on_wait)
        return
    with ray_session(ray_config):
        verified_actor(store)  # what is wrong with it is said before anything is done
        yield SharedCurator(store, owner, wait_s, on_wait)
