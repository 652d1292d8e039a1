"""Focus events: what a session showed, scored and edited, and what it was worth. They train LensNet and curation.

An append-only log of Parquet files in the context's folder, each written once: to a temporary name, synced, renamed.
Events wait in memory until there are enough of them, or somebody flushes (a session does at the end of every answer); a
crash loses those that wait and leaves no half file. Small files are merged when there are enough events in them: the
merged one is there before they go, and readers count an event once. Parquet alone does not notice every flipped bit, so
a file's name ends in the crc32c of its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptTreeError, DiskFullError, StorageError
from storage.durable import fsync_folder, make_folder_durably, write_file_durably

logger = logging.getLogger("megacontext.storage")

EVENTS_FOLDER = "focus"
FLUSH_EVENTS = 64

_CHECKSUM = re.compile(r"-crc([0-9a-f]{8})\.parquet$")
"""In the names of files; those written before this was done have none."""

_BLOCKS = pa.list_(pa.struct([("source", pa.int16()), ("block", pa.int64())]))

SCHEMA = pa.schema(
    [
        ("session", pa.string()),
        ("number", pa.int64()),
        ("time", pa.float64()),
        ("reason", pa.string()),
        ("policy", pa.string()),
        ("contexts", pa.list_(pa.struct([("context", pa.string()), ("version", pa.int64())]))),
        ("num_tokens", pa.int64()),
        ("budget", pa.int32()),
        ("cost", pa.int32()),
        ("entries", pa.list_(pa.struct([("source", pa.int16()), ("lod", pa.int8()), ("index", pa.int64())]))),
        (
            "scores",
            pa.list_(pa.struct([("source", pa.int16()), ("block", pa.int64()), ("score", pa.float32())])),
        ),
        ("found", _BLOCKS),
        ("pinned", _BLOCKS),
        ("added", _BLOCKS),
        ("dropped", _BLOCKS),
        ("num_aged", pa.int32()),
        ("rows_reused", pa.int32()),
        ("rows_read", pa.int32()),
        ("seconds", pa.map_(pa.string(), pa.float32())),
        ("num_decoded", pa.int32()),
        ("nll_decoded", pa.float32()),
        ("warning", pa.string()),
    ],
    metadata={b"megacontext.focus_events": b"1"},
)
"""Version 1. `block`s are of the context `contexts[source]`; `policy` is JSON; `seconds` are of wall time by part of
the refocus; `nll_decoded` is the mean NLL in nats of the `num_decoded` tokens decoded until the next refocus, null
where there were none."""

Block = tuple[int, int]
"""`(block, source)`."""


@dataclass
class FocusEvent:
    """One refocus; fields as in `SCHEMA`."""

    session: str
    number: int
    reason: str
    policy: str
    contexts: list[tuple[str, int]]
    num_tokens: int
    budget: int
    cost: int
    entries: list[tuple[int, int, int]]
    """`(lod, index, source)`."""
    scores: dict[Block, float]
    found: list[Block]
    pinned: list[Block]
    added: list[Block]
    dropped: list[Block]
    num_aged: int
    rows_reused: int = 0
    rows_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    num_decoded: int = 0
    nll_decoded: float | None = None
    warning: str = ""
    time: float = field(default_factory=time.time)


def _row(event: FocusEvent) -> dict[str, object]:
    row = {f.name: getattr(event, f.name) for f in fields(event)}
    row["contexts"] = [{"context": name, "version": seq} for name, seq in event.contexts]
    row["entries"] = [{"source": source, "lod": lod, "index": index} for lod, index, source in event.entries]
    row["scores"] = [{"source": s, "block": b, "score": score} for (b, s), score in sorted(event.scores.items())]
    for name in ("found", "pinned", "added", "dropped"):
        row[name] = [{"source": source, "block": block} for block, source in getattr(event, name)]
    row["seconds"] = list(event.seconds.items())
    return row


class FocusEventLog:
    """Appends one session's events."""

    def __init__(self, context_folder: Path) -> None:
        self._folder = context_folder / EVENTS_FOLDER
        self._waiting: list[FocusEvent] = []
        self._small: list[tuple[Path, int]] = []
        """Files of this log that may be merged, and how many events each holds."""
        self._has_folder = False

    def add(self, event: FocusEvent) -> None:
        """Keep a finished event; written when enough wait.

        Raises:
            DiskFullError, StorageError: the disk refused; the events still wait.
        """
        self._waiting.append(event)
        if len(self._waiting) >= FLUSH_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Make every event durable. Errors as of `add`."""
        if not self._waiting:
            return
        # Names in the order of time, so that a listing is the order of events.
        table = pa.Table.from_pylist([_row(event) for event in self._waiting], SCHEMA)
        path = self._write(f"{time.time_ns():020d}", table)
        self._small.append((path, len(self._waiting)))
        self._waiting.clear()
        if sum(count for _, count in self._small) >= FLUSH_EVENTS:
            self._merge()

    def _merge(self) -> None:
        """One file instead of many small ones."""
        small, self._small = [path for path, _ in self._small], []
        if len(small) < 2:
            return
        try:
            tables = [_read(path) for path in small]
            self._write(small[0].name.partition("-")[0], pa.concat_tables(tables))
            for path in small:
                path.unlink()
            fsync_folder(self._folder)
        except (StorageError, OSError, pa.ArrowException) as error:
            # Many small files hold the same events.
            logger.warning("focus events under %s stay in %d small files: %s", self._folder, len(small), error)

    def _write(self, prefix: str, table: pa.Table) -> Path:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        name = f"{prefix}-crc{google_crc32c.value(data):08x}.parquet"
        temporary = self._folder / f".{name}.tmp"
        try:
            if not self._has_folder:
                make_folder_durably(self._folder)
                self._has_folder = True
            write_file_durably(temporary, data)
            temporary.rename(self._folder / name)
            fsync_folder(self._folder)
        except OSError as error:
            # A full or broken disk may refuse this too; the error of the write is what counts.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kind = DiskFullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else StorageError
            raise kind(
                f"cannot write focus events under {self._folder}: {error}; they are kept and tried again"
            ) from error
        return self._folder / name


def _read(path: Path, filters: list[tuple[str, str, str]] | None = None) -> pa.Table:
    data = path.read_bytes()
    checksum = _CHECKSUM.search(path.name)
    if checksum is not None and int(checksum[1], 16) != google_crc32c.value(data):
        raise CorruptTreeError(f"{path} is damaged: its checksum does not match. Restore it or move it away.")
    return pq.read_table(pa.BufferReader(data), schema=SCHEMA, filters=filters)


def check_focus_events(context_folder: Path) -> list[str]:
    """One line for each file of a context's focus events that is damaged, naming it."""
    problems = []
    for path in sorted((context_folder / EVENTS_FOLDER).glob("*.parquet")):
        try:
            _read(path)
        except (CorruptTreeError, pa.ArrowException, OSError) as error:
            problems.append(str(error) if str(path) in str(error) else f"{path} holds no focus events: {error}")
    return problems


def read_focus_events(context_folder: Path, session: str | None = None) -> pa.Table:
    """Events of a context, all or one session's, oldest first; an empty table where there are none.

    Raises:
        CorruptTreeError: a file that is damaged or no Parquet of this schema; names it.
    """
    tables = []
    for path in sorted((context_folder / EVENTS_FOLDER).glob("*.parquet")):
        try:
            chosen = None if session is None else [("session", "=", session)]
            tables.append(_read(path, chosen))
        except (pa.ArrowException, OSError) as error:
            raise CorruptTreeError(f"{path} holds no focus events: {error}; move it away to read the others") from error
    if not tables:
        return SCHEMA.empty_table()
    table = pa.concat_tables(tables)
    # A crash between merging files and removing them leaves events twice.
    names = zip(table["session"].to_pylist(), table["number"].to_pylist(), strict=True)
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    return table if len(first) == table.num_rows else table.take(sorted(first.values()))
