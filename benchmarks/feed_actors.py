"""CPU time of compaction through plain actors against a bare loop over the same modules, in steady state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compaction import (
    COMPUTE_THREADS,
    ActorFeed,
    BareLoop,
    check_same_tree,
    plan_compaction,
)
from benchmarks.corpus import corpus_files
from benchmarks.harness import Result, Setting, say
from benchmarks.process_tree import Child, Usage
from cluster.config import GistNetConfig

SMALL_NET = GistNetConfig(kind="block", hidden_dim=64)
"""A block transformer of width 64: about 11 ms a window of 1,024 tokens on one core."""


def feed_actors(setting: Setting) -> Result:
    """The default net, with which the demo compacts; beside it a small one, to which a feed adds 30 times as much."""
    default = GistNetConfig(lm_layers=setting.size(8, 2))
    with setting.scratch() as root:
        rounds, files = setting.size((4, 1), (1, 1))
        ratios, detail = _compare(setting, root / "default", default, rounds, files)
        small_rounds, small_files = setting.size((4, 12), (1, 2))
        small_ratios, small_detail = _compare(setting, root / "small", SMALL_NET, small_rounds, small_files)
    found = {
        **detail,
        "small_net": {"cpu_ratio": round(float(np.median(small_ratios)), 3), **small_detail},
        "threads": COMPUTE_THREADS,
    }
    return Result.of_repeats(ratios, f"{rounds} parts of the corpus, in turns", found)


def _compare(
    setting: Setting, root: Path, gistnet: GistNetConfig, rounds: int, files_per_round: int
) -> tuple[list[float], dict[str, Any]]:
    """CPU ratio of each round, and absolute numbers. Both sides compact the same files into contexts of their own."""
    bare_job, feed_job = (plan_compaction(setting, root / name, gistnet, "actors") for name in ("bare", "feed"))
    with Child(BareLoop, bare_job) as bare, Child(ActorFeed, feed_job) as feed:
        usages: list[tuple[Usage, Usage]] = []
        # Round 0 warms up: lazy imports and first touches are no steady state.
        for number in range(rounds + 1):
            files = corpus_files(setting, number * files_per_round, files_per_round)
            mine, theirs = feed.measure("ingest", files), bare.measure("ingest", files)
            check_same_tree(mine.result, theirs.result)
            usages.append((mine, theirs))
            say(f"  {gistnet.kind}, part {number}: feed {mine.cpu_s:.2f} CPU-s, bare loop {theirs.cpu_s:.2f} CPU-s")
        num_tokens = usages[-1][1].result.num_tokens - usages[0][1].result.num_tokens
        measured = usages[1:]
        feed_cpu, bare_cpu = (sum(pair[side].cpu_s for pair in measured) for side in (0, 1))
        feed_wall, bare_wall = (sum(pair[side].wall_s for pair in measured) for side in (0, 1))
        detail = {
            "gistnet": gistnet.kind,
            "compute_dtype": bare_job.plan.base_lm.dtype,
            "tokens": num_tokens,
            "feed_cpu_us_per_token": round(feed_cpu / num_tokens * 1e6, 2),
            "bare_cpu_us_per_token": round(bare_cpu / num_tokens * 1e6, 2),
            "wall_ratio": round(feed_wall / bare_wall, 3),
            "bare_tokens_per_s": round(num_tokens / bare_wall),
            "feed_start_s": round(feed.start_s, 1),
            "bare_start_s": round(bare.start_s, 1),
        }
    return [mine.cpu_s / theirs.cpu_s for mine, theirs in measured], detail
