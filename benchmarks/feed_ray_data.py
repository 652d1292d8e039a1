"""Wall time of bulk compaction through Ray Data against a bare loop over the same modules.

A run through Ray Data costs what its start and end cost, and so much a token. Two corpora, a small one and a large
one, tell the two apart: the difference of their times is steady state, without choosing where it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.compaction import COMPUTE_THREADS, BareLoop, RayDataFeed, check_same_tree, plan_compaction
from benchmarks.corpus import TOKENS_PER_FILE, corpus_files
from benchmarks.feed_actors import SMALL_NET
from benchmarks.harness import BenchmarkError, Result, Setting, say
from benchmarks.process_tree import Child, Usage

BULK_TOKENS = 5_000_000


@dataclass(frozen=True)
class _Steady:
    """One side of one repeat: a small ingest and a large one."""

    small: Usage
    large: Usage
    small_tokens: int
    large_tokens: int

    @property
    def wall_us_per_token(self) -> float:
        return (self.large.wall_s - self.small.wall_s) / (self.large_tokens - self.small_tokens) * 1e6

    @property
    def cpu_us_per_token(self) -> float:
        return (self.large.cpu_s - self.small.cpu_s) / (self.large_tokens - self.small_tokens) * 1e6

    @property
    def fixed_wall_s(self) -> float:
        return self.small.wall_s - self.small_tokens * self.wall_us_per_token / 1e6

    @property
    def fixed_cpu_s(self) -> float:
        return self.small.cpu_s - self.small_tokens * self.cpu_us_per_token / 1e6


def feed_ray_data(setting: Setting) -> Result:
    """Repeats on different parts of the corpus, the bare loop and the feed in turns."""
    repeats = setting.size(2, 1)
    # Large enough that the difference alone is a bulk corpus.
    small_files, large_files = setting.size((8, 8 + -(-BULK_TOKENS // TOKENS_PER_FILE)), (1, 3))
    found: list[tuple[_Steady, _Steady]] = []
    with setting.scratch() as root:
        bare_job, feed_job = (plan_compaction(setting, root / name, SMALL_NET, "ray_data") for name in ("bare", "feed"))
        with Child(BareLoop, bare_job) as bare, Child(RayDataFeed, feed_job) as feed:
            warm_up = corpus_files(setting, 0, 1)
            tokens = bare.measure("ingest", warm_up).result.num_tokens
            feed.measure("ingest", warm_up)
            first = len(warm_up)
            for repeat in range(repeats):
                sides: list[dict[str, Usage]] = [{}, {}]
                sizes: dict[str, int] = {}
                for part, count in (("small", small_files), ("large", large_files)):
                    files = corpus_files(setting, first, count)
                    first += count
                    for side, child in zip(sides, (feed, bare), strict=True):
                        side[part] = child.measure("ingest", files)
                    check_same_tree(sides[0][part].result, sides[1][part].result)
                    sizes[part] = sides[1][part].result.num_tokens - tokens
                    tokens += sizes[part]
                    say(
                        f"  repeat {repeat}, {sizes[part]:,} tokens: feed {sides[0][part].wall_s:.1f} s, "
                        f"bare loop {sides[1][part].wall_s:.1f} s"
                    )
                feed_side, bare_side = (
                    _Steady(side["small"], side["large"], sizes["small"], sizes["large"]) for side in sides
                )
                found.append((feed_side, bare_side))
            feed_start_s = feed.start_s
    bulk = min(side.large_tokens - side.small_tokens for _, side in found)
    if not setting.quick and bulk < BULK_TOKENS:
        raise BenchmarkError(f"the corpus held {bulk:,} tokens, fewer than {BULK_TOKENS:,}")
    detail = {
        "tokens": bulk,
        "gistnet": f"{SMALL_NET.kind}, width {SMALL_NET.hidden_dim}",
        "threads": COMPUTE_THREADS,
        "cpu_ratio": _median(mine.cpu_us_per_token / theirs.cpu_us_per_token for mine, theirs in found),
        "wall_ratio_fixed_costs_included": _median(m.large.wall_s / t.large.wall_s for m, t in found),
        "fixed_wall_s": _median(mine.fixed_wall_s for mine, _ in found),
        "fixed_cpu_s": _median(mine.fixed_cpu_s for mine, _ in found),
        "cluster_start_s": round(feed_start_s, 1),
        "feed_wall_us_per_token": _median(mine.wall_us_per_token for mine, _ in found),
        "bare_wall_us_per_token": _median(theirs.wall_us_per_token for _, theirs in found),
        "feed_cpu_us_per_token": _median(mine.cpu_us_per_token for mine, _ in found),
        "bare_cpu_us_per_token": _median(theirs.cpu_us_per_token for _, theirs in found),
    }
    ratios = [mine.wall_us_per_token / theirs.wall_us_per_token for mine, theirs in found]
    return Result.of_repeats(ratios, f"{repeats} corpora, in turns", detail)


def _median(values) -> float:
    return round(float(np.median(list(values))), 3)
