"""A session in an actor: answers streamed, numbers published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from actors.lens_service import start_lens_service
from actors.session import SessionSpec
from actors.session_actor import SessionActor, turn_metrics
from actors.session_turn import Turn
from cluster.ray_runtime import RaySession
from models.lensnet import LensNetSpec
from models.lensnet.net import untrained_lensnet
from tests.actors.helpers import make_text
from tests.actors.sessions.support import SAMPLING, document
from tests.prometheus import scrape


def test_the_actor_streams_its_answers(spec: SessionSpec, ray_cluster: RaySession) -> None:
    del ray_cluster
    actor: Any = ray.remote(SessionActor).options(num_cpus=0.1).remote(spec)
    assert ray.get(actor.ready.remote()) == 0
    stream = actor.ask.options(num_returns="streaming").remote("where is the tree?", SAMPLING)
    *pieces, turn = [ray.get(piece) for piece in stream]
    assert isinstance(turn, Turn)
    assert "".join(str(piece) for piece in pieces) == turn.text
    assert ray.get(actor.read.remote(document("d", "text"), "some text"))
    ray.get(actor.close.remote())
    ray.kill(actor)


@pytest.mark.slow
def test_the_actor_asks_a_service_and_publishes_its_numbers(
    spec: SessionSpec, tmp_path: Path, ray_cluster: RaySession
) -> None:
    del ray_cluster
    untrained_lensnet(LensNetSpec(key_dim=spec.plan.gistnet.key_dim)).save(tmp_path / "net")
    service = start_lens_service(tmp_path / "net", num_cpus=0.1)
    actor: Any = ray.remote(SessionActor).options(num_cpus=0.1).remote(spec, lens_service=service)
    text = make_text(1, 500)
    ray.get(actor.read.remote(document("d", text), text))
    *_, turn = [ray.get(piece) for piece in actor.ask.options(num_returns="streaming").remote(text[:60], SAMPLING)]
    assert isinstance(turn, Turn)
    stats: Any = ray.get(service.stats.remote())
    assert stats["num_requests"] >= turn.num_refocuses
    present, added = turn_metrics(turn, 0)
    wanted = {f"ray_{name}" for name in {**present, **added}}
    assert {"ray_swap_rate", "ray_first_token_seconds", "ray_turn_seconds_decode"} <= wanted
    found = scrape(wanted, timeout_s=40)
    assert found.keys() == wanted
    assert float(found["ray_answer_tokens_total"].rpartition(" ")[2]) == turn.num_answer_tokens == 40
    assert all('job="session"' in line and 'run="own"' in line for line in found.values())
    ray.get(actor.close.remote())
    ray.kill(actor)
    ray.kill(service)
