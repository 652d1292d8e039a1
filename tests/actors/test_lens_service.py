"""The LensNet service: batches, refuses, swaps, and answers everybody with what their own net would have said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayError

from actors import lens_service
from actors.lens_service import LensService, LensServiceConfig, RemoteLens, Scored, start_lens_service
from cluster.errors import BusyError, ModelError, ResourceTimeoutError
from cluster.ray_calls import get_or_raise
from cluster.ray_runtime import RaySession
from models.lensnet import CandidateSet, LensNet
from tests.models.lensnet.test_net import SPEC, candidates, opinionated


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 30)

    return asyncio.run(bounded())


def other_net() -> LensNet:
    net = opinionated()
    with torch.no_grad():
        net.score.weight.neg_()
    return net


def test_everybody_gets_the_answer_to_their_own_question() -> None:
    net, sets = opinionated(), [candidates(1 + number % 9, number) for number in range(40)]

    async def main() -> list[Scored]:
        service = LensService(net, LensServiceConfig(max_batch=16, max_wait_ms=20))
        answers = await asyncio.gather(*(service.score(found) for found in sets))
        stats = service.stats()
        assert stats["num_requests"] == 40
        assert stats["batch_max"] == 16
        assert 0 < stats["ms_p50"] <= stats["ms_p99"]
        return answers

    for found, answer in zip(sets, run(main), strict=True):
        np.testing.assert_allclose(answer.scores, net.scores(found), atol=1e-5)
        assert answer.net == net.digest()


def test_one_that_comes_alone_waits_no_longer_than_it_must() -> None:
    async def main() -> float:
        service = LensService(opinionated(), LensServiceConfig(max_batch=64, max_wait_ms=50))
        await service.score(candidates(3))
        started = time.perf_counter()
        await service.score(candidates(3))
        return time.perf_counter() - started

    assert 0.04 < run(main) < 5


def test_a_full_batch_does_not_wait() -> None:
    async def main() -> float:
        service = LensService(opinionated(), LensServiceConfig(max_batch=4, max_wait_ms=20_000))
        started = time.perf_counter()
        await asyncio.gather(*(service.score(candidates(3, n)) for n in range(4)))
        return time.perf_counter() - started

    assert run(main) < 15


def test_too_many_are_refused_and_the_others_answered() -> None:
    async def main() -> tuple[list[Any], dict[str, Any]]:
        service = LensService(opinionated(), LensServiceConfig(max_batch=2, max_wait_ms=50, max_queue=5))
        answers = await asyncio.gather(*(service.score(candidates(3, n)) for n in range(12)), return_exceptions=True)
        return answers, service.stats()

    answers, stats = run(main)
    refused = [answer for answer in answers if isinstance(answer, BusyError)]
    assert len(refused) == stats["num_refused"] == 7
    assert sum(isinstance(answer, Scored) for answer in answers) == stats["num_requests"] == 5


def test_weights_change_between_batches() -> None:
    first, second = opinionated(), other_net()

    async def main() -> tuple[Scored, Scored]:
        service = LensService(first)
        before = await service.score(candidates(5))
        assert service.swap(second) == second.digest()
        return before, await service.score(candidates(5))

    before, after = run(main)
    assert (before.net, after.net) == (first.digest(), second.digest())
    np.testing.assert_allclose(after.scores, second.scores(candidates(5)), atol=1e-5)
    assert not np.allclose(before.scores, after.scores)


def test_a_net_of_other_keys_is_not_swapped_in() -> None:
    async def main() -> str:
        service = LensService(opinionated())
        with pytest.raises(ModelError, match="of another GistNet"):
            service.swap(opinionated(replace(SPEC, key_dim=3)))
        return (await service.score(candidates(2))).net

    assert run(main) == opinionated().digest()


def test_what_does_not_fit_is_refused_and_hurts_nobody() -> None:
    net, good = opinionated(), candidates(4)
    wide = CandidateSet(good.blocks, good.features, np.zeros((4, 9), np.float32), np.zeros(9, np.float32))
    features = good.features.copy()
    features[1, 2] = np.nan
    unknown = CandidateSet(good.blocks, features, good.keys, good.query)

    async def main() -> list[Any]:
        service = LensService(net)
        asked = (service.score(found) for found in (wide, good, unknown, candidates(0)))
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third, empty = run(main)
    assert isinstance(first, ModelError)
    assert isinstance(third, ModelError)
    np.testing.assert_allclose(second.scores, net.scores(good), atol=1e-5)
    assert len(empty.scores) == 0


def test_a_batch_that_fails_is_an_error_and_the_next_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = lens_service._scores, []

    def flaky(net: LensNet, sets: Any) -> Any:
        calls.append(len(sets))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return real(net, sets)

    monkeypatch.setattr(lens_service, "_scores", flaky)

    async def main() -> Scored:
        service = LensService(opinionated())
        with pytest.raises(ModelError, match="out of memory"):
            await service.score(candidates(3))
        return await service.score(candidates(3))

    assert len(run(main).scores) == 3


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_ms": -1.0}])
def test_settings_that_would_never_answer_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        LensServiceConfig(**wrong)


def test_sessions_ask_it_over_ray(ray_cluster: RaySession, tmp_path: Path) -> None:
    net = opinionated()
    net.save(tmp_path / "net")
    other_net().save(tmp_path / "other")
    actor = start_lens_service(tmp_path / "net", LensServiceConfig(max_queue=8, max_batch=4), num_cpus=0.5)

    @ray.remote(num_cpus=0.1)
    def session(number: int, actor: Any) -> float:
        lens = RemoteLens(actor, timeout_s=60)
        worst = 0.0
        for turn in range(10):
            found = candidates(1 + (number + turn) % 7, 100 * number + turn)
            worst = max(worst, float(np.abs(lens.scores(found) - opinionated().scores(found)).max()))
        return worst

    worst = ray.get([session.remote(number, actor) for number in range(6)], timeout=120)
    assert max(worst) < 1e-5
    stats: Any = ray.get(actor.stats.remote(), timeout=30)
    assert stats["num_requests"] == 60

    assert ray.get(actor.swap.remote(str(tmp_path / "other")), timeout=30) == other_net().digest()
    np.testing.assert_allclose(RemoteLens(actor).scores(candidates(5)), other_net().scores(candidates(5)), atol=1e-5)

    ray.kill(actor, no_restart=False)
    _wait_until_restarted(actor)
    again = RemoteLens(actor, timeout_s=60).scores(candidates(5))
    np.testing.assert_allclose(again, net.scores(candidates(5)), atol=1e-5)
    ray.kill(actor)


def _wait_until_restarted(actor: Any) -> None:
    """A killed process may answer a little longer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            stats: Any = ray.get(actor.stats.remote(), timeout=30)
        except RayError:
            continue
        if stats["num_swaps"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError("it was not started again")


def test_a_service_that_stays_busy_is_an_error(ray_cluster: RaySession) -> None:
    class Busy:
        def score(self, candidates: CandidateSet) -> None:
            raise BusyError("full")

    remote: Any = ray.remote(num_cpus=0.1)(Busy)
    actor = remote.remote()
    with pytest.raises(BusyError):  # its process has everything loaded by then
        get_or_raise(actor.score.remote(candidates(2)), 120, "the first answer")
    slept: list[float] = []
    lens = RemoteLens(actor, timeout_s=3.0, sleep=lambda s: (slept.append(s), time.sleep(s))[0])
    with pytest.raises(ResourceTimeoutError, match="was busy for 3 s"):
        lens.scores(candidates(2))
    assert slept == sorted(slept)
    assert len(slept) > 3
