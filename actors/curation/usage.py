"""What of a context is used: per span, how useful it was lately, how old it is and whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int8, Int64

from cluster.config import BLOCKS_PER_SUPER_BLOCK
from storage.contract import DocumentInfo
from storage.focus.events import read_focus_events
from storage.tree.reader import ContextReader
from storage.versions.history import History

DAY_S = 86400.0

USES = ("added", "found", "pinned")
"""Columns of a focus event with the blocks that were shown by choice. The raw tail is none."""


@dataclass(frozen=True)
class Usage:
    """Columns over the spans of one version: span `i` is blocks `[32 i, 32 i + 32)`, complete ones only."""

    utility: Float64[np.ndarray, " spans"]
    """Uses, each halved by every half-life since: refocuses that showed a block of it by choice, or had one as a
    candidate that scored no less than what they showed, as they do with what is pruned."""
    last_used: Float64[np.ndarray, " spans"]
    """Unix seconds; that of being stored where it never was."""
    stored_at: Float64[np.ndarray, " spans"]
    """Unix seconds, of its newest block."""
    state: Int8[np.ndarray, " spans"]
    """`BlockState` of its most detailed block: whole as soon as one block is."""
    is_open: Bool[np.ndarray, " spans"]
    """A block of it belongs to the document that is still growing."""
    document: Int64[np.ndarray, " spans"]
    """Position of its first block's document among the version's."""
    last_document: Int64[np.ndarray, " spans"]
    """Of its last block's."""

    def __len__(self) -> int:
        return len(self.utility)


def measure_usage(
    reader: ContextReader,
    documents: list[DocumentInfo],
    *,
    now: float,
    half_life_days: float,
    event_folders: Sequence[Path] = (),
) -> Usage:
    """Read focus events, and a context's versions.

    Args:
        reader: of the version that is looked at.
        documents: of that version.
        now: unix seconds; events and versions after it are left out.
        half_life_days: a use counts half after so many days.
        event_folders: folders of the contexts whose sessions may have read this one: a session writes its events to its
            own context. None is the context itself alone.
    """
    num_spans = reader.version.num_blocks // BLOCKS_PER_SUPER_BLOCK
    events = pa.concat_tables([read_focus_events(folder) for folder in event_folders or [reader.folder]])
    utility, last_used = _uses(events, reader, num_spans, now, half_life_days)
    stored_at = _stored_at(reader, num_spans)
    states = reader.block_states(0, num_spans * BLOCKS_PER_SUPER_BLOCK).reshape(num_spans, -1)
    starts = np.array([document.first_block for document in documents], np.int64)
    first = np.arange(num_spans, dtype=np.int64) * BLOCKS_PER_SUPER_BLOCK
    document = np.searchsorted(starts, first, side="right") - 1
    last_document = np.searchsorted(starts, first + BLOCKS_PER_SUPER_BLOCK - 1, side="right") - 1
    grows = bool(documents) and documents[-1].state == "open"
    return Usage(
        utility,
        np.maximum(last_used, stored_at),
        stored_at,
        states.min(axis=1) if num_spans else np.zeros(0, np.int8),
        (last_document == len(documents) - 1) & grows,
        document,
        last_document,
    )


def _uses(
    events: pa.Table, reader: ContextReader, num_spans: int, now: float, half_life_days: float
) -> tuple[np.ndarray, np.ndarray]:
    """`(weight, last)` by span: an event counts once for a span, however many of its blocks it names."""
    weight, last = np.zeros(num_spans), np.zeros(num_spans)
    if events.num_rows == 0 or num_spans == 0:
        return weight, last
    times = events["time"].to_numpy()
    # Where this context is among those that an event speaks of; block numbers of others mean nothing here.
    mine = np.full(events.num_rows, -1)
    contexts = events["contexts"].combine_chunks()
    place = np.concatenate([np.arange(n) for n in _lengths(contexts)])
    named = contexts.flatten().field("context").to_numpy(zero_copy_only=False) == reader.version.context
    mine[_parents(contexts)[named]] = place[named]
    shown = [_blocks(events[name].combine_chunks()) for name in USES]
    event, source, block = (np.concatenate(column) for column in zip(*shown, strict=True))
    scores = events["scores"].combine_chunks()
    of, candidate_source, candidate = _blocks(scores)
    score = scores.flatten().field("score").to_numpy(zero_copy_only=False)
    was_shown = np.isin(_key(of, candidate_source, candidate), _key(event, source, block))
    least = np.full(events.num_rows, np.inf)
    np.minimum.at(least, of[was_shown], score[was_shown])
    # Where nothing was shown by choice, what promised anything would have been.
    least[np.isinf(least)] = np.nextafter(0.0, 1.0)
    worth = score >= least[of]
    event = np.concatenate([event, of[worth]])
    source = np.concatenate([source, candidate_source[worth]])
    block = np.concatenate([block, candidate[worth]])
    own = (source == mine[event]) & (block < num_spans * BLOCKS_PER_SUPER_BLOCK) & (times[event] <= now)
    event, span = np.unique(np.stack([event[own], block[own] // BLOCKS_PER_SUPER_BLOCK]), axis=1)
    np.add.at(weight, span, 0.5 ** ((now - times[event]) / (half_life_days * DAY_S)))
    np.maximum.at(last, span, times[event])
    return weight, last


def _lengths(column: pa.ListArray) -> np.ndarray:
    return pc.call_function("list_value_length", [column]).to_numpy()


def _parents(column: pa.ListArray) -> np.ndarray:
    """The row that each value of a column of lists is in."""
    return np.repeat(np.arange(len(column)), _lengths(column))


def _blocks(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(event, source, block)` of everything that a column of events names."""
    values = column.flatten()
    source, block = (values.field(part).to_numpy(zero_copy_only=False) for part in ("source", "block"))
    return _parents(column), source.astype(np.int64), block.astype(np.int64)


def _key(event: np.ndarray, source: np.ndarray, block: np.ndarray) -> np.ndarray:
    """One number for a block in an event: of 2^8 sources, 2^32 blocks and 2^23 events."""
    return (event << 40) | (source << 32) | block


def _stored_at(reader: ContextReader, num_spans: int) -> np.ndarray:
    """When the newest block of each span was stored."""
    blocks, times = History(reader.folder, reader.version.context).growth(reader.lineage, reader.version.seq)
    if num_spans == 0:
        return np.zeros(0)
    ends = (np.arange(num_spans) + 1) * BLOCKS_PER_SUPER_BLOCK
    return times[np.searchsorted(blocks, ends, side="left").clip(max=len(times) - 1)]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
