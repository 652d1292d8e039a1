"""One LensNet for many sessions: their candidate sets are scored together, a batch at a time.

A request waits until a batch is full or the first of it has waited long enough, never longer than a batch takes to
compute. The queue is bounded: where it is full a request is refused at once (`BusyError`), so that callers slow down
instead of memory growing; `RemoteLens` tries again, later every time, until its own time is up. Weights can be changed
while requests come: a batch is scored by one net, and the answer says which.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float32
from ray.exceptions import RayError

from cluster.errors import BusyError, MegaContextError, ModelError, ResourceTimeoutError
from cluster.metric_names import LENS_BATCH_MEAN, LENS_MS_P50, LENS_MS_P99, LENS_QUEUE, LENS_REQUESTS_TOTAL
from cluster.metrics import MetricPublisher
from cluster.ray_calls import CALL_TIMEOUT_S, check_resources, get_or_raise, own_error
from models.lensnet import CandidateSet, LensNet
from models.lensnet.net import padded

KEPT_REQUESTS = 4096
"""Newest requests that latencies and batch sizes are told of."""
PUBLISH_EVERY_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.1
"""Of a caller that was refused."""


@dataclass(frozen=True)
class LensServiceConfig:
    """How long requests wait for each other, and how many may wait."""

    max_batch: int = 64
    """Sets scored together at most."""
    max_wait_ms: float = 2.0
    """Longest that a set waits for others while the net is idle."""
    max_queue: int = 256
    """Sets that wait at most; one more is refused."""

    def __post_init__(self) -> None:
        """Refuse what would never answer.

        Raises:
            ModelError: naming the values.
        """
        if self.max_batch < 1 or self.max_queue < 1 or self.max_wait_ms < 0:
            raise ModelError(f"a LensNet service needs max_batch and max_queue of 1 or more, max_wait_ms of 0: {self}")


@dataclass(frozen=True, eq=False)
class Scored:
    """An answer."""

    scores: Float32[np.ndarray, " n"]
    """Of the candidates, nats a token."""
    net: str
    """Digest of the net that made it."""


@dataclass
class _Request:
    candidates: CandidateSet
    answer: asyncio.Future[Scored]
    came: float


class LensService:
    """The service as a plain asyncio class: one event loop, one thread that computes."""

    def __init__(
        self, net: LensNet, config: LensServiceConfig | None = None, publisher: MetricPublisher | None = None
    ) -> None:
        self._config = config or LensServiceConfig()
        self._net, self._digest = net.eval(), net.digest()
        self._publisher = publisher
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._latencies: deque[float] = deque(maxlen=KEPT_REQUESTS)
        self._batches: deque[int] = deque(maxlen=KEPT_REQUESTS)
        self._num_requests = self._num_refused = self._num_swaps = 0
        self._published = 0.0
        self._told_requests = 0

    async def score(self, candidates: CandidateSet) -> Scored:
        """Score a set, together with what others ask meanwhile.

        Raises:
            BusyError: too many wait already; ask again later.
            ModelError: candidates that do not fit the net.
        """
        self._check(candidates)
        if len(candidates) == 0:
            return Scored(np.empty(0, np.float32), self._digest)
        if len(self._waiting) >= self._config.max_queue:
            self._num_refused += 1
            raise BusyError(f"{len(self._waiting)} candidate sets wait to be scored; ask again later")
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        request = _Request(candidates, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.append(request)
        self._arrived.set()
        if len(self._waiting) >= self._config.max_batch:
            self._full.set()
        return await request.answer

    def swap(self, net: LensNet) -> str:
        """Score with another net from the next batch on; its digest.

        Raises:
            ModelError: it reads other keys than the one before.
        """
        if net.spec.key_dim and self._net.spec.key_dim and net.spec.key_dim != self._net.spec.key_dim:
            raise ModelError(
                f"the new LensNet reads keys of {net.spec.key_dim} dimensions, the one that serves of "
                f"{self._net.spec.key_dim}: it is of another GistNet"
            )
        self._net, self._digest = net.eval(), net.digest()
        self._num_swaps += 1
        return self._digest

    def stats(self) -> dict[str, Any]:
        """Requests so far, and of the newest: latency in ms within the service, sets a batch."""
        latencies = np.array(self._latencies or [0.0]) * 1e3
        return {
            "net": self._digest,
            "num_requests": self._num_requests,
            "num_refused": self._num_refused,
            "num_swaps": self._num_swaps,
            "num_waiting": len(self._waiting),
            "ms_p50": float(np.percentile(latencies, 50)),
            "ms_p99": float(np.percentile(latencies, 99)),
            "batch_mean": float(np.mean(self._batches or [0])),
            "batch_max": int(max(self._batches, default=0)),
        }

    def _check(self, candidates: CandidateSet) -> None:
        width = self._net.spec.key_dim
        if width and candidates.keys.shape[1] != width:
            raise ModelError(f"this LensNet reads keys of {width} dimensions, not {candidates.keys.shape[1]}")
        if not (np.isfinite(candidates.features).all() and np.isfinite(candidates.keys).all()):
            raise ModelError("candidates have signals that are not finite")

    async def _work(self) -> None:
        """Batch after batch, for as long as requests come."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._gather()
            size = min(len(self._waiting), self._config.max_batch)
            batch = [self._waiting.popleft() for _ in range(size)]
            if not self._waiting:
                self._arrived.clear()
            if len(self._waiting) < self._config.max_batch:
                self._full.clear()
            batch = [request for request in batch if not request.answer.cancelled()]
            if not batch:
                continue
            net, digest = self._net, self._digest
            try:
                # In a thread: requests keep coming in, and are the next batch.
                scores = await loop.run_in_executor(None, _scores, net, [r.candidates for r in batch])
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(ModelError(f"scoring failed: {error}"))
                continue
            done = time.perf_counter()
            for request, found in zip(batch, scores, strict=True):
                if not request.answer.done():
                    request.answer.set_result(Scored(found, digest))
                self._latencies.append(done - request.came)
            self._batches.append(len(batch))
            self._num_requests += len(batch)
            self._publish(done)

    async def _gather(self) -> None:
        """Wait for a full batch, or until the first has waited its time."""
        left = self._config.max_wait_ms / 1e3 - (time.perf_counter() - self._waiting[0].came)
        if left > 0 and len(self._waiting) < self._config.max_batch:
            try:
                await asyncio.wait_for(self._full.wait(), left)
            except TimeoutError:
                return

    def _publish(self, now: float) -> None:
        if self._publisher is None or now - self._published < PUBLISH_EVERY_S:
            return
        self._published = now
        stats = self.stats()
        self._publisher.set(
            {
                LENS_MS_P50: stats["ms_p50"],
                LENS_MS_P99: stats["ms_p99"],
                LENS_BATCH_MEAN: stats["batch_mean"],
                LENS_QUEUE: stats["num_waiting"],
            }
        )
        self._publisher.add({LENS_REQUESTS_TOTAL: self._num_requests - self._told_requests})
        self._told_requests = self._num_requests


def _scores(net: LensNet, sets: Sequence[CandidateSet]) -> list[Float32[np.ndarray, " n"]]:
    """Of every set, computed together."""
    device = net.feature_mean.device
    with torch.inference_mode():
        found = net(*(tensor.to(device) for tensor in padded(sets))).cpu().numpy()
    return [found[row, : len(candidates)].copy() for row, candidates in enumerate(sets)]


class LensServiceActor:
    """Hosts a `LensService`: an asyncio actor, so that requests meet in it."""

    def __init__(self, path: str, config: LensServiceConfig | None = None, num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self._service = LensService(LensNet.load(Path(path)), config, MetricPublisher("lens_service", "service"))

    async def score(self, candidates: CandidateSet) -> Scored:
        """As `LensService.score`."""
        return await self._service.score(candidates)

    async def swap(self, path: str) -> str:
        """Serve the net in another folder; its digest. What cannot be loaded changes nothing."""
        net = await asyncio.get_running_loop().run_in_executor(None, LensNet.load, Path(path))
        return self._service.swap(net)

    async def stats(self) -> dict[str, Any]:
        """As `LensService.stats`."""
        return self._service.stats()


def start_lens_service(path: Path | str, config: LensServiceConfig | None = None, *, num_cpus: float = 1.0) -> Any:
    """A service in an actor of its own; restarted where it dies, with the net it was started with: swap again what was
    swapped in.

    Raises:
        ResourceError: the cluster cannot hold it.
        ModelError: there is no such net.
    """
    config = config or LensServiceConfig()
    check_resources([{"CPU": num_cpus}], "the LensNet service")
    remote: Any = ray.remote(LensServiceActor)
    # All that may wait, a batch that is computed, and room to be told that it is busy.
    actor = remote.options(
        num_cpus=num_cpus,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=2 * (config.max_queue + config.max_batch),
    ).remote(str(path), config)
    get_or_raise(actor.stats.remote(), CALL_TIMEOUT_S, "loading LensNet")
    return actor


class RemoteLens:
    """A session's way to a service: called like a net of its own."""

    def __init__(self, actor: Any, timeout_s: float = 10.0, sleep: Callable[[float], None] = time.sleep) -> None:
        """Args: `timeout_s` is how long a set of candidates may take, refusals included."""
        self._actor = actor
        self._timeout_s = timeout_s
        self._sleep = sleep

    def scores(self, candidates: CandidateSet) -> Float32[np.ndarray, " n"]:
        """As `LensNet.scores`.

        Raises:
            ResourceTimeoutError: the service was busy, or did not answer, for too long.
            ModelError: the candidates do not fit its net.
        """
        deadline = time.monotonic() + self._timeout_s
        pause = FIRST_PAUSE_S
        while True:
            left = deadline - time.monotonic()
            try:
                return get_or_raise(
                    self._actor.score.remote(candidates), max(left, 0.001), "the LensNet service"
                ).scores
            except BusyError as error:
                if left <= pause:
                    raise ResourceTimeoutError(f"the LensNet service was busy for {self._timeout_s:g} s") from error
            except RayError as error:
                # A service that died is started anew by Ray; its callers wait for it.
                if own_error(error) is not None or left <= pause:
                    raise _unreachable(error) from error
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _unreachable(error: RayError) -> MegaContextError:
    return own_error(error) or ResourceTimeoutError(f"the LensNet service is gone: {error}")
