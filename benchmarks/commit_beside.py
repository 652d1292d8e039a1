"""Commits while the same writer seals segments or collects garbage, against commits with nothing beside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import BenchmarkError, Result, Setting, percentiles, say
from benchmarks.synthetic import IDENTITY, SuperBlocks, encoding, put_levels
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from storage.schema import Encoding
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter
from storage.tree.rebuild import EncodingBuilder
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching

MOST_COMMITS = 20_000
"""Of a phase: work beside that does not end is an error, not a longer measurement."""

SEGMENT_SUPER_BLOCKS = 32


def commit_while_sealing(setting: Setting) -> Result:
    """The commits before leave what is sealed then: segments of tokens and gists."""
    backlog = setting.size(1024, 64)
    level = encoding(keys=False)

    def measure(root: Path) -> tuple[np.ndarray, np.ndarray, float]:
        with closing(_writer(root, level)) as writer:
            stream = SuperBlocks(level, seed=0)
            quiet = _commits(writer, stream, _Count(backlog))
            beside, taken = _beside(writer, stream, writer.sealer.seal)
        return quiet, beside, taken

    return _repeated(setting, measure, "sealing")


def commit_while_collecting(setting: Setting) -> Result:
    """Of discarded branches their segments and journal, of a dropped encoding its share of segments with tokens."""
    num_super_blocks = setting.size(256, 32)
    level = encoding(keys=False)

    def measure(root: Path) -> tuple[np.ndarray, np.ndarray, float]:
        with closing(_writer(root, level)) as writer:
            stream = SuperBlocks(level, seed=0)
            _leave_garbage(writer, stream, num_super_blocks)
            quiet = _commits(writer, stream, _Count(setting.size(500, 20)))
            found = []
            beside, taken = _beside(
                writer, stream, lambda: found.append(Store(root).collect(writer, keep_s=0.0, clip_share=0.5))
            )
        if not (found and found[0].segments and found[0].shortened and found[0].journal_rows):
            raise BenchmarkError(f"the collection should find garbage of all kinds, it found {found}")
        return quiet, beside, taken

    return _repeated(setting, measure, "collecting")


def _repeated(setting: Setting, measure: Callable[[Path], tuple[np.ndarray, np.ndarray, float]], what: str) -> Result:
    quiet, beside, seconds = [], [], []
    repeats = setting.size(7, 2)
    for _ in range(repeats):
        with setting.scratch() as root:
            without, with_it, taken = measure(root)
        say(f"  {len(with_it)} commits in {taken:.2f} s of {what}")
        quiet.append(without)
        beside.append(with_it)
        seconds.append(taken)
    ratios = [float(np.percentile(b, 99) / np.percentile(q, 99)) for b, q in zip(beside, quiet, strict=True)]
    detail = {
        f"{what}_s": [round(taken, 3) for taken in seconds],
        "commits_beside": [len(taken) for taken in beside],
        "beside": {**percentiles(np.concatenate(beside), 1e3, "ms"), "max_ms": _largest_ms(beside)},
        "without": {**percentiles(np.concatenate(quiet), 1e3, "ms"), "max_ms": _largest_ms(quiet)},
    }
    return Result.of_repeats(ratios, f"{repeats} contexts, commits before and during", detail)


def _largest_ms(parts: list[np.ndarray]) -> float:
    return round(float(max(part.max() for part in parts)) * 1e3, 3)


def _writer(root: Path, level: Encoding) -> ContextWriter:
    """A new context's writer, which seals when it is told to."""
    Store(root, create=True).create_context("context", IDENTITY, level)
    folder = Store(root).folder("context")
    return ContextWriter(folder, "context", segment_super_blocks=SEGMENT_SUPER_BLOCKS, seal_in_background=False)


def _leave_garbage(writer: ContextWriter, stream: SuperBlocks, num_super_blocks: int) -> None:
    level = writer.encoding
    _write(writer, stream, num_super_blocks)
    put_levels(writer, level)
    writer.flush()
    branching = Branching(writer)
    branching.fork("draft")
    writer.switch("draft")
    # A part of a segment stays in the journal.
    _write(writer, SuperBlocks(level, seed=2), num_super_blocks + SEGMENT_SUPER_BLOCKS // 2)
    writer.switch("main")
    branching.discard("draft")
    builder = EncodingBuilder(writer, replace(level, gistnet_digest="sha256:another"))
    num_nodes, lod = writer.version().num_blocks, 1
    while num_nodes:
        vectors = np.zeros((num_nodes, level.arrays[0].width), np.float16)
        builder.put_nodes(lod, 0, {spec.name: vectors for spec in level.arrays})
        num_nodes, lod = num_nodes // K, lod + 1
    builder.activate()
    writer.flush()


def _write(writer: ContextWriter, stream: SuperBlocks, num_super_blocks: int) -> None:
    """Whole documents into segments, what fills none into the journal."""
    bulk = BulkWriter(writer)
    target = writer.version().num_blocks + num_super_blocks * BLOCKS_PER_SUPER_BLOCK
    pending = writer.version().num_blocks
    while pending < target:
        span = next(stream)
        bulk.append([span])
        pending += span.num_blocks
    bulk.flush()


class _Count:
    """Says so many times that there is more to do."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _commits(writer: ContextWriter, stream: SuperBlocks, more: Callable[[], bool]) -> np.ndarray:
    """Seconds of commits of a super-block each, one after the other while there is `more`."""
    seconds: list[float] = []
    while more():
        span = next(stream)
        started = time.perf_counter()
        writer.append([span])
        seconds.append(time.perf_counter() - started)
        if len(seconds) > MOST_COMMITS:
            raise BenchmarkError(f"what runs beside the commits did not end within {MOST_COMMITS:,} of them")
    return np.array(seconds)


def _beside(writer: ContextWriter, stream: SuperBlocks, work: Callable[[], object]) -> tuple[np.ndarray, float]:
    """Seconds of the commits made while a thread does `work`, and of the work."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="beside")
    started = time.perf_counter()
    thread.start()
    seconds = _commits(writer, stream, thread.is_alive)
    thread.join()
    taken = time.perf_counter() - started
    if errors:
        raise errors[0]
    if not len(seconds):
        raise BenchmarkError("what runs beside the commits ended before the first of them; take more of it")
    return seconds, taken
