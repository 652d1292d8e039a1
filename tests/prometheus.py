"""What a node of the test's cluster publishes."""

from __future__ import annotations

import time
import urllib.request

import ray


def scrape(wanted: set[str], timeout_s: float) -> dict[str, str]:
    """Lines of the node's Prometheus endpoint by metric name, those of the wanted ones, until all are there."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        found = {name: line for line in lines if (name := line.partition("{")[0]) in wanted}
        if len(found) == len(wanted) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
