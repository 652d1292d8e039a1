"""Who does curation's work: this process, as the context's writer for as long as one piece takes, or the actor of the
store's service that has the context, between the calls of the job that writes it."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
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


class Curator(ABC):
    """Does one piece of `work.WORK` after the other on a branch of a context."""

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

    @abstractmethod
    def _try(self, work: str, arguments: tuple[Any, ...]) -> Any:
        """The piece of work, if nobody else is the writer now."""


class OwnCurator(Curator):
    """Opens the context for every piece."""

    def _try(self, work: str, arguments: tuple[Any, ...]) -> Any:
        store = Store(self.store.root)
        with store.open_maintenance(self.store.context, self.store.version, self.owner) as writer:
            return WORK[work](store, writer, *arguments)


class ServedCurator(Curator):
    """Has the service's actor do it."""

    def __init__(self, actor: Any, *arguments: Any, **named: Any) -> None:
        """Args: `actor` hosts the `StoreService` that has the context; the others as `Curator`."""
        super().__init__(*arguments, **named)
        self._actor = actor

    def _try(self, work: str, arguments: tuple[Any, ...]) -> Any:
        ref = self._actor.curate.remote(self.store.context, self.store.version, self.owner, work, *arguments)
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
        yield OwnCurator(store, owner, wait_s, on_wait)
        return
    with ray_session(ray_config):
        actor = verified_actor(store)
        if actor is None:
            yield OwnCurator(store, owner, wait_s, on_wait)
        else:
            yield ServedCurator(actor, store, owner, wait_s, on_wait)
