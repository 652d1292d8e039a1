"""Live metrics through Ray's Prometheus endpoint, under the names of `cluster.metric_names`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class MetricPublisher:
    """Publishes a process's numbers as `ray_<name>`, tagged with job and run.

    Without a started Ray (tests, plain loops) every call does nothing. Make one in each process that
    publishes: it holds Ray objects that do not travel between processes.
    """

    def __init__(self, job: str, run: str) -> None:
        """Args: the job's name and the run's, which become the tags `job` and `run`."""
        self._tags = {"job": job, "run": run}
        self._metrics: dict[str, Any] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Publish present values (gauges)."""
        for name, value in values.items():
            if metric := self._metric(name, "Gauge"):
                metric.set(float(value))

    def add(self, values: Mapping[str, float]) -> None:
        """Add to what only grows (counters, `..._total`). Values below or equal to 0 are left out."""
        for name, value in values.items():
            if value > 0 and (metric := self._metric(name, "Counter")):
                metric.inc(float(value))

    def _metric(self, name: str, kind: str) -> Any:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        if name not in self._metrics:
            from ray.util import metrics

            metric = getattr(metrics, kind)(name, description=name.replace("_", " "), tag_keys=("job", "run"))
            metric.set_default_tags(self._tags)
            self._metrics[name] = metric
        return self._metrics[name]
