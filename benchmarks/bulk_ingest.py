"""Bulk ingest of ready-made gists against a plain file of the same bytes: what durability, checksums and Zarr cost."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.harness import BenchmarkError, Result, Setting
from benchmarks.synthetic import DIM, IDENTITY, SuperBlocks, encoding
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from storage.contract import SpanWrite
from storage.geometry import complete_nodes, deepest_lod
from storage.store import Store
from storage.tree.bulk_writer import GATHER_S, BulkWriter

SUPER_BLOCKS_PER_SEGMENT = 32
"""The default of `store.segment_super_blocks`: bulk ingest acknowledges a segment, so the rival syncs as often."""

SPANS_PER_CALL = 8

Levels = list[tuple[int, np.ndarray]]
"""LOD and its nodes, `(nodes, 576)` float16."""


def bulk_ingest(setting: Setting) -> Result:
    """10 M tokens with gists of every level, `BulkWriter` and file in turns, each time from nothing."""
    num_super_blocks = -(-setting.size(10_000_000, 100_000) // SLOTS_PER_SUPER_BLOCK)
    repeats = setting.size(5, 2)
    levels = _levels(num_super_blocks * BLOCKS_PER_SUPER_BLOCK)
    ours, theirs, once = [], [], []
    with setting.scratch() as root:
        for number in range(repeats):
            store = root / f"store-{number}"
            sides = [
                (ours, lambda store=store: _ingest(store, num_super_blocks, levels)),
                (theirs, lambda: _append(root / "plain", num_super_blocks, levels, SUPER_BLOCKS_PER_SEGMENT)),
                (once, lambda: _append(root / "plain", num_super_blocks, levels, num_super_blocks)),
            ]
            turn = number % len(sides)
            for taken, side in sides[turn:] + sides[:turn]:
                # Neither pays for what the other left to be freed or written.
                gc.collect()
                os.sync()
                taken.append(side())
    num_bytes = _payload_bytes(num_super_blocks, levels)
    detail = {
        "tokens": num_super_blocks * SLOTS_PER_SUPER_BLOCK,
        "payload_bytes": num_bytes,
        "bulk_ingest_s": [round(taken, 3) for taken in ours],
        "plain_file_s": [round(taken, 3) for taken in theirs],
        "plain_file_one_fsync_s": [round(taken, 3) for taken in once],
        "bulk_ingest_mb_per_s": round(num_bytes / 1e6 / float(np.median(ours)), 1),
        "ratio_to_one_fsync": round(float(np.median(ours) / np.median(once)), 3),
    }
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Result.of_repeats(ratios, f"{repeats} ingests a side, in turns", detail)


def _ingest(root: Path, num_super_blocks: int, levels: Levels) -> float:
    """Seconds from the first span to the last acknowledgement, everything in segments that fills one."""
    level = encoding(keys=False)
    writer = Store(root, create=True).open_writer("bulk", IDENTITY, level, create=True)
    calls = _calls(SuperBlocks(level, seed=0), num_super_blocks)
    bulk = BulkWriter(writer, GATHER_S)
    try:
        started = time.perf_counter()
        for spans in calls:
            bulk.append(spans)
        bulk.flush()
        for lod, gists in levels:
            bulk.put_nodes(lod, 0, {"gists": gists})
        bulk.flush()
        taken = time.perf_counter() - started
        version = bulk.version()
        expected = (num_super_blocks * BLOCKS_PER_SUPER_BLOCK, *(len(gists) for _, gists in levels))
        if version.level_counts != expected:
            raise BenchmarkError(f"bulk ingest stored {version.level_counts} nodes, expected {expected}")
    finally:
        bulk.close()
    return taken


def _append(path: Path, num_super_blocks: int, levels: Levels, sync_every: int) -> float:
    """Seconds of writing the same tokens, counts and gists to the end of a file, synced every so many super-blocks."""
    calls = _calls(SuperBlocks(encoding(keys=False), seed=0), num_super_blocks)
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            written = 0
            for spans in calls:
                for span in spans:
                    for values in (span.tokens, span.num_tokens, *(np.asarray(v) for v in span.arrays.values())):
                        _write(file.fileno(), values)
                    written += 1
                    if written % sync_every == 0:
                        os.fsync(file.fileno())
            for _, gists in levels:
                _write(file.fileno(), gists)
                os.fsync(file.fileno())
            os.fsync(file.fileno())
        taken = time.perf_counter() - started
        if path.stat().st_size != _payload_bytes(num_super_blocks, levels):
            raise BenchmarkError(f"{path} has {path.stat().st_size} bytes: the disk took only a part of a write")
    finally:
        path.unlink(missing_ok=True)
    return taken


def _write(descriptor: int, values: np.ndarray) -> None:
    os.write(descriptor, np.ascontiguousarray(values).data)


def _calls(stream: SuperBlocks, num_super_blocks: int) -> list[Sequence[SpanWrite]]:
    """Spans as a feed hands them over. Their values are drawn before any clock runs."""
    spans = list(islice(stream, num_super_blocks))
    return [spans[first : first + SPANS_PER_CALL] for first in range(0, len(spans), SPANS_PER_CALL)]


def _levels(num_blocks: int) -> Levels:
    """Random nodes for LOD2 and above."""
    rng = np.random.default_rng(1)
    shapes = [(lod, complete_nodes(lod, num_blocks)) for lod in range(2, deepest_lod(num_blocks) + 1)]
    return [(lod, rng.standard_normal((count, DIM), np.float32).astype(np.float16)) for lod, count in shapes]


def _payload_bytes(num_super_blocks: int, levels: Levels) -> int:
    num_blocks = num_super_blocks * BLOCKS_PER_SUPER_BLOCK
    block_bytes = 32 * 4 + 1 + DIM * 2
    return num_blocks * block_bytes + sum(gists.nbytes for _, gists in levels)
