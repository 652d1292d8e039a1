"""Every benchmark by name: what it measures, against whom, and the budget its ratio must keep."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from benchmarks.harness import Result, Setting


@dataclass(frozen=True)
class Benchmark:
    """A program that finds one ratio."""

    name: str
    target: str
    """`module:function` of `benchmarks`; imported when it runs, so that none starts with another's libraries."""
    rival: str
    """What the value is divided by, in the unit of both."""
    budget: float
    """Largest value that is good."""

    def run(self, setting: Setting) -> Result:
        """Measure.

        Raises:
            MegaContextError: a side failed, or the two did different work.
        """
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)(setting)


BENCHMARKS = (
    Benchmark("feed_actors", "feed_actors:feed_actors", "CPU time of a bare loop over the same modules", 1.10),
    Benchmark("feed_ray_data", "feed_ray_data:feed_ray_data", "wall time of a bare loop over the same modules", 1.15),
    Benchmark("ingest_memory", "ingest_memory:ingest_memory", "peak memory of ingesting a tenth of the tokens", 1.05),
    Benchmark("append_cost", "append_cost:append_cost", "p50 of an append to a context of 10 k tokens", 1.10),
    Benchmark(
        "durable_commit", "durable_commit:durable_commit", "p50 of appending the bytes to a log, with fdatasync", 1.50
    ),
    Benchmark("bulk_ingest", "bulk_ingest:bulk_ingest", "a plain file of the same bytes, synced 1.3 MB at a time", 2.0),
    Benchmark("commit_p50", "commit_latency:commit_p50", "p50 of a bare SQLite commit of the same bytes", 1.20),
    Benchmark("commit_p99", "commit_latency:commit_p99", "p99 of a bare SQLite commit of the same bytes", 3.0),
    Benchmark("commit_flat", "commit_latency:commit_flat", "p50 of a context's first commits", 1.10),
    Benchmark("commit_while_sealing", "commit_beside:commit_while_sealing", "p99 of commits with nothing beside", 2.0),
    Benchmark(
        "commit_while_collecting", "commit_beside:commit_while_collecting", "p99 of commits with nothing beside", 2.0
    ),
    Benchmark("open_time", "open_time:open_time", "opening a context of 65,536 tokens", 1.20),
    Benchmark(
        "concurrent_readers", "concurrent_readers:concurrent_readers", "twice the reads a second of one process", 1.25
    ),
    Benchmark("gist_error", "gist_error:gist_error", "relative error of float16", 64.0),
    Benchmark("warm_read_node", "warm_reads:warm_read_node", "p50 of a copy out of a memmap", 4.0),
    Benchmark("warm_read_group", "warm_reads:warm_read_group", "p50 of a copy out of a memmap", 3.0),
    Benchmark("warm_read_batch", "warm_reads:warm_read_batch", "p50 of a gather out of a memmap", 3.0),
    Benchmark("assembly", "assembly:assembly", "p50 of a plain gather of the same vectors", 1.5),
    Benchmark("long_history", "long_history:long_history", "p50 of the same from a history of 64 k tokens", 1.5),
    Benchmark("allocators", "allocators:allocators", "the value of greedy's choice (above it: the optimum's)", 1.02),
    Benchmark("session_cost", "session_cost:session_cost", "wall time a token with a history of 64 k tokens", 1.10),
    Benchmark("edit_traces", "edit_traces:edit_traces", "reading the whole Working Context anew", 0.20),
    Benchmark("full_context", "full_context:full_context", "the model with all of 7,936 tokens in its context", 1.00),
    Benchmark("lens_service", "lens_service:lens_service", "p99 of the same service without batches", 1.00),
    Benchmark("candidate_search", "candidate_search:candidate_search", "wall time of decoding 32 tokens", 0.02),
    Benchmark("lensnet_pass", "lensnet_pass:lensnet_pass", "one prefill of as many tokens by the LM", 0.05),
    Benchmark("sealed_size", "sealed_size:sealed_size", "bytes of tokens, gists and keys", 1.05),
    Benchmark("curation_bytes", "curation_year:curation_bytes", "bytes of all raw tokens of a simulated year", 0.10),
    Benchmark("curation_missed", "curation_year:curation_missed", "spans used in each of the next four weeks", 0.01),
    Benchmark("attention", "attention:attention", "the kernel that is not taken on this CPU, same tensors", 1.00),
    Benchmark("gistnet_vs_prefill", "gistnet_prefill:gistnet_vs_prefill", "one prefill of the window by the LM", 0.50),
    Benchmark("training_stack", "training_stack:training_stack", "wall time of the same step in a bare loop", 1.10),
)
