from __future__ import annotations

import pytest
import ray

from cluster import metric_names as names
from cluster.metrics import MetricPublisher
from cluster.ray_runtime import RaySession
from tests.prometheus import scrape


def test_without_ray_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    publisher = MetricPublisher("compact", "r")
    publisher.set({names.TOKENS_PER_S: 1.0})
    publisher.add({names.TOKENS_TOTAL: 5})
    assert publisher._metrics == {}


@pytest.mark.slow
def test_numbers_appear_at_the_prometheus_endpoint_by_their_names(ray_cluster: RaySession) -> None:
    publisher = MetricPublisher("compact", "small")
    publisher.set({names.TOKENS_PER_S: 12.5})
    publisher.set({names.TOKENS_PER_S: 10.5})
    for _ in range(3):
        publisher.add({names.TOKENS_TOTAL: 32, names.DOCUMENTS_TOTAL: 0})
    found = scrape({"ray_tokens_per_s", "ray_tokens_total"}, timeout_s=40)
    values = {name: float(line.rpartition(" ")[2]) for name, line in found.items()}
    assert values == {"ray_tokens_per_s": 10.5, "ray_tokens_total": 96.0}, found
    assert all('job="compact"' in line and 'run="small"' in line for line in found.values())
