"""Peak memory of ingest at two sizes of corpus, through both feeds: it must not grow."""

from __future__ import annotations

from typing import Any

from benchmarks.compaction import FEEDS, Feed, Host, plan_compaction
from benchmarks.corpus import TOKENS_PER_FILE, corpus_files
from benchmarks.harness import Result, Setting, say
from benchmarks.process_tree import Child, Memory
from cluster.config import GistNetConfig

CHEAP_NET = GistNetConfig(kind="last_token")
"""Gists and keys of the LM's full width at hardly any cost, so that ten million tokens take minutes."""


def ingest_memory(setting: Setting) -> Result:
    """Each ingest in a fresh process with a fresh cluster; the value is the worse feed's."""
    sizes = setting.size((1_000_000, 10_000_000), (35_000, 70_000))
    ratios: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for feed, host in FEEDS.items():
        peaks = []
        for size in sizes:
            tokens, peak = _peak(setting, feed, host, size)
            say(f"  {feed}, {tokens:,} tokens: {peak.needed / 2**20:.0f} MiB")
            peaks.append(peak)
            detail[f"{feed}_{size}"] = {
                "tokens": tokens,
                "anonymous_mib": round(peak.anonymous / 2**20, 1),
                "shared_mib": round(peak.shared / 2**20, 1),
                "mapped_files_mib": round(peak.files / 2**20, 1),
            }
        ratios[feed] = peaks[1].needed / peaks[0].needed
    detail["memory"] = "anonymous and shared pages of driver, workers and Ray's servers; shared pages counted once"
    found = list(ratios.values())
    return Result(max(found), (min(found), max(found)), f"feeds {' and '.join(ratios)}, one run each size", detail)


def _peak(setting: Setting, feed: Feed, host: Host, num_tokens: int) -> tuple[int, Memory]:
    files = corpus_files(setting, 0, -(-num_tokens // TOKENS_PER_FILE))
    with setting.scratch() as root:
        job = plan_compaction(setting, root / "store", CHEAP_NET, feed)
        with Child(host, job) as child:
            usage = child.measure("ingest", files, memory=True)
    assert usage.peak is not None
    return usage.result.num_tokens, usage.peak
