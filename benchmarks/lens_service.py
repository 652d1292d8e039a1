"""A LensNet service under 64 sessions at once, against the same service that scores one set at a time.

Every session sends one set of candidates after another, as large as a refocus makes them, over Ray on loopback, and
checks each answer against the net's own. Nothing may be lost or answered with another's scores.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.lens_service import LensServiceConfig, start_lens_service
from benchmarks.harness import BenchmarkError, Result, Setting, say
from cluster.config import RayConfig
from cluster.errors import BusyError
from cluster.ray_calls import own_error
from cluster.ray_runtime import ray_session
from models.lensnet import FEATURES, CandidateSet, LensNet, LensNetSpec
from models.lensnet.net import untrained_lensnet

NUM_SESSIONS, NUM_CLIENTS = 64, 4
"""Sessions, and the processes they share."""
KEY_DIM = 128
NUM_CANDIDATES = (24, 56)
"""Of a refocus: 12 by words and by keys each, those behind them, the newest; from one history or two."""
TOLERANCE = 1e-4


def lens_service(setting: Setting) -> Result:
    """Ratio of the 99th percentile of what a session waits for its scores: batched over one by one."""
    rounds, repeats = setting.size(40, 3), setting.size(5, 1)
    with setting.scratch() as folder, ray_session(RayConfig(address="local", num_cpus=8)):
        _net().save(folder / "net")
        services = {
            "batched": start_lens_service(folder / "net", LensServiceConfig()),
            "single": start_lens_service(folder / "net", LensServiceConfig(max_batch=1, max_wait_ms=0.0)),
        }
        remote: Any = ray.remote(num_cpus=0.5)(_Client)
        clients = [remote.remote(str(folder / "net"), number) for number in range(NUM_CLIENTS)]
        ray.get([client.sessions.remote(services["batched"], 1) for client in clients])
        waited: dict[str, list[np.ndarray]] = {name: [] for name in services}
        seconds: dict[str, list[float]] = {name: [] for name in services}
        for repeat in range(repeats):
            for name in list(services)[:: 1 if repeat % 2 else -1]:
                started = time.perf_counter()
                found = ray.get([client.sessions.remote(services[name], rounds) for client in clients])
                seconds[name].append(time.perf_counter() - started)
                waited[name].append(np.concatenate(found))
                if len(waited[name][-1]) != NUM_SESSIONS * rounds:
                    raise BenchmarkError(f"{name}: {NUM_SESSIONS * rounds - len(waited[name][-1])} answers were lost")
            say(f"  repeat {repeat + 1} of {repeats}")
        stats: dict[str, Any] = {name: ray.get(actor.stats.remote()) for name, actor in services.items()}
    p99 = {name: [float(np.percentile(times, 99)) for times in of] for name, of in waited.items()}
    detail: dict[str, Any] = {
        name: {
            "sessions": NUM_SESSIONS,
            "requests": sum(len(times) for times in waited[name]),
            "lost": 0,
            "wait_ms_p50": round(1e3 * float(np.median(np.concatenate(waited[name]))), 2),
            "wait_ms_p99": round(1e3 * float(np.median(p99[name])), 2),
            "requests_per_s": round(NUM_SESSIONS * rounds / float(np.median(seconds[name]))),
            "sets_a_batch": round(stats[name]["batch_mean"], 1),
            "refused_and_asked_again": stats[name]["num_refused"],
        }
        for name in services
    }
    ratios = [batched / single for batched, single in zip(p99["batched"], p99["single"], strict=True)]
    return Result.of_repeats(ratios, f"{NUM_SESSIONS} sessions of {rounds} requests", detail)


def _net() -> LensNet:
    net = untrained_lensnet(LensNetSpec(key_dim=KEY_DIM))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(net.score.weight)
    return net


def _candidates(seed: int) -> CandidateSet:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(*NUM_CANDIDATES))
    keys = rng.standard_normal((n + 1, KEY_DIM)).astype(np.float32)
    return CandidateSet(np.arange(n), rng.random((n, len(FEATURES)), np.float32), keys[:-1], keys[-1])


class _Client:
    """A process with some of the sessions."""

    def __init__(self, path: str, number: int) -> None:
        torch.set_num_threads(1)
        net = LensNet.load(Path(path))
        self._sets = [_candidates(1000 * number + i) for i in range(NUM_SESSIONS // NUM_CLIENTS)]
        self._scores = [net.scores(found) for found in self._sets]

    async def sessions(self, service: Any, rounds: int) -> np.ndarray:
        """Seconds that every request of every session took."""
        found = await asyncio.gather(*(self._session(service, i, rounds) for i in range(len(self._sets))))
        return np.concatenate(found)

    async def _session(self, service: Any, index: int, rounds: int) -> np.ndarray:
        waited = []
        for _ in range(rounds):
            started = time.perf_counter()
            scored = await self._asked(service, index)
            waited.append(time.perf_counter() - started)
            if np.abs(scored.scores - self._scores[index]).max() > TOLERANCE:
                raise BenchmarkError("a session got other scores than its net's")
        return np.array(waited)

    async def _asked(self, service: Any, index: int) -> Any:
        while True:
            try:
                return await service.score.remote(self._sets[index])
            except Exception as error:
                if not isinstance(own_error(error), BusyError):
                    raise
                await asyncio.sleep(0.005)
