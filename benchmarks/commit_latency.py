"""Durable commits of super-blocks against bare SQLite, and late commits of a context against its first ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import NUM_SPREAD_BLOCKS, BenchmarkError, Result, Setting, percentiles, say, time_in_turns
from benchmarks.synthetic import IDENTITY, SuperBlocks, encoding
from storage.store import Store
from storage.tree.writer import ContextWriter

LATE = 10_000
"""Commits of an old context."""


def commit_p50(setting: Setting) -> Result:
    """The median of a commit of tokens and 32 gists."""
    return _against_sqlite(setting, 50, rounds=setting.size(2000, 20))


def commit_p99(setting: Setting) -> Result:
    """What one commit in a hundred takes."""
    return _against_sqlite(setting, 99, rounds=setting.size(5000, 50))


def commit_flat(setting: Setting) -> Result:
    """Commits of an old context and of new ones, in turns."""
    late, rounds = setting.size((LATE, 200), (100, 4))
    level = encoding(keys=False)
    ratios, new, old = [], [], []
    with setting.scratch() as root, ExitStack() as stack:
        writer, stream = _open(root, "old", stack)
        while writer.version().seq < late - rounds * NUM_SPREAD_BLOCKS // 2:
            writer.append([next(stream)])
        say(f"  {writer.version().seq:,} commits of {writer.version().num_tokens:,} tokens")
        for part in range(NUM_SPREAD_BLOCKS):
            first, beginning = _open(root, f"new-{part}", stack)
            calls = {
                "old": lambda _: writer.append([next(stream)]),
                "new": lambda _, first=first, beginning=beginning: first.append([next(beginning)]),
            }
            seconds = time_in_turns(calls, rounds, warm_up=setting.size(5, 1))
            ratios.append(float(np.median(seconds["old"]) / np.median(seconds["new"])))
            new.append(seconds["new"])
            old.append(seconds["old"])
        commits = writer.version().seq
    detail = {
        "commits": commits,
        "payload_bytes": len(_payload(SuperBlocks(level, seed=0))),
        "first_commits": percentiles(np.concatenate(new), 1e3, "ms"),
        "late_commits": percentiles(np.concatenate(old), 1e3, "ms"),
    }
    return Result.of_repeats(ratios, f"{len(ratios)} parts of {rounds} commits, in turns", detail)


def _against_sqlite(setting: Setting, q: int, rounds: int) -> Result:
    with setting.scratch() as root, ExitStack() as stack:
        writer, stream = _open(root, "context", stack)
        bare = BareSqlite(root / "context" / "bare.sqlite")
        stack.callback(bare.close)
        payloads = SuperBlocks(encoding(keys=False), seed=0)
        calls = {
            "commit": lambda _: writer.append([next(stream)]),
            "bare": lambda _: bare.append(_payload(payloads)),
        }
        warm_up = setting.size(50, 2)
        seconds = time_in_turns(calls, rounds, warm_up)
        if bare.num_rows() != rounds + warm_up:
            raise BenchmarkError("bare SQLite lost a row")
        detail = {
            "payload_bytes": len(_payload(payloads)),
            "commit": percentiles(seconds["commit"], 1e3, "ms"),
            "bare_sqlite": percentiles(seconds["bare"], 1e3, "ms"),
        }
    return percentile_ratio(seconds["commit"], seconds["bare"], q, "commits, in turns", detail)


class BareSqlite:
    """One table of blobs, with the durability of our catalogue: WAL, synchronous=FULL, a transaction a row."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("CREATE TABLE rows (row_id INTEGER PRIMARY KEY, payload BLOB NOT NULL)")

    def append(self, payload: bytes) -> None:
        """Insert a row; durable when it returns."""
        self._connection.execute("INSERT INTO rows (payload) VALUES (?)", (payload,))

    def num_rows(self) -> int:
        """Rows of the table."""
        return int(self._connection.execute("SELECT count(*) FROM rows").fetchone()[0])

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


def percentile_ratio(subject: np.ndarray, rival: np.ndarray, q: int, unit: str, detail: Mapping[str, Any]) -> Result:
    """Ratio of a percentile over consecutive parts of a run, as `harness.median_ratio` of the median."""
    parts = zip(np.array_split(subject, NUM_SPREAD_BLOCKS), np.array_split(rival, NUM_SPREAD_BLOCKS), strict=True)
    ratios = [float(np.percentile(mine, q) / np.percentile(theirs, q)) for mine, theirs in parts]
    return Result.of_repeats(ratios, f"{len(ratios)} parts of {len(subject)} {unit}", detail)


def _open(root: Path, name: str, stack: ExitStack) -> tuple[ContextWriter, SuperBlocks]:
    """A new context's writer, and what to append."""
    level = encoding(keys=False)
    writer = stack.enter_context(closing(Store(root, create=True).open_writer(name, IDENTITY, level, create=True)))
    return writer, SuperBlocks(level, seed=0)


def _payload(stream: SuperBlocks) -> bytes:
    """The bytes of a super-block: tokens, counts and gists."""
    span = next(stream)
    return b"".join(bytes(values.data) for values in (span.tokens, span.num_tokens, *span.arrays.values()))
