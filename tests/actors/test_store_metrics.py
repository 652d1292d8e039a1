"""What a store tells a dashboard, and that dashboard and alerts ask for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from actors.store_metrics import StoreMetrics, store_numbers
from cluster import metric_names
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import RayConfig
from cluster.ray_runtime import ray_session
from storage.versions.branching import Branching
from tests.prometheus import scrape
from tests.storage.support import Text, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("float16")
DEPLOY = Path(__file__).parents[2] / "cluster/deploy"
RUNBOOK = Path(__file__).parents[2] / "docs/operations.md"


def test_numbers_follow_the_store(tmp_path: Path) -> None:
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path, seal_in_background=False) as writer:
        assert store_numbers(writer, [])["store_nodes_behind"] == 0
        writer.append([Text("one", 100 * K).span(ENCODING)])
        before = store_numbers(writer, [1.0, 2.0, 3.0])
        assert before["context_tokens"] == 100 * K
        assert before["store_nodes_behind"] == 3
        assert before["store_journal_rows"] == 8
        assert (before["store_segments"], before["store_sealing_waits"]) == (0, 0)
        assert before["commit_ms_p50"] == 2.0
        follow(writer, ENCODING)
        writer.flush()
        Branching(writer).roll_back(writer.version().seq)
        after = store_numbers(writer, [])
        assert after["store_nodes_behind"] == 0
        assert after["store_segments"] == 3
        assert after["store_journal_bytes"] < before["store_journal_bytes"]
        assert after["store_retired_branches"] == 1
        assert after["store_free_bytes"] > 0


@pytest.mark.timeout(120)
def test_they_are_at_rays_endpoint(tmp_path: Path) -> None:
    new_store(tmp_path, ENCODING)
    with ray_session(RayConfig()), open_context(tmp_path) as writer:
        metrics = StoreMetrics("ctx")
        metrics.committed(writer.append([Text("one", 100 * K).span(ENCODING)]))
        metrics.publish(writer, [1.0], now=True)
        found = scrape({"ray_store_blocks_total", "ray_context_tokens"}, timeout_s=60)
    assert 'job="store"' in found["ray_context_tokens"]
    assert found["ray_context_tokens"].endswith('run="ctx"} 3200.0')
    assert found["ray_store_blocks_total"].endswith(" 100.0")


def asked_for() -> set[str]:
    board = json.loads((DEPLOY / "grafana/tree-stores.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return {name for expression in expressions for name in re.findall(r"ray_(\w+)", expression)}


def test_dashboard_and_alerts_ask_for_what_is_published() -> None:
    known = {value for name, value in vars(metric_names).items() if name.isupper()}
    assert asked_for() <= known
    assert {"store_free_bytes", "store_sealing_waits", "commit_ms_p99"} <= asked_for()


def test_the_runbook_says_what_to_do_about_every_alert() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert alerts == set(re.findall(r"^\| `(Store\w+)`", RUNBOOK.read_text(), re.MULTILINE))
