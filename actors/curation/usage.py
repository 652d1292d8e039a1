"""What of a context is used: per span, how often it will be, as far as its own uses and those of its document say, how
old it is and whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int8, Int64

from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.curation_config import CurationPolicy
from storage.contract import DocumentInfo
from storage.focus.events import read_focus_events
from storage.tree.reader import ContextReader
from storage.versions.history import History

DAY_S = 86400.0

UTILITY_DAYS = 30.0
"""Utility is uses in so many days."""

MIN_WATCHED_DAYS = 7.0
"""What is younger counts as watched for so long: one use within an hour is no rate."""

USES = ("added", "found", "pinned")
"""Columns of a focus event with the blocks that were shown by choice. The raw tail is none."""


@dataclass(frozen=True)
class Usage:
    """Columns over the spans of one version: span `i` is blocks `[32 i, 32 i + 32)`, complete ones only."""

    utility: Float64[np.ndarray, " spans"]
    """Uses to be expected in `UTILITY_DAYS`."""
    uses: Float64[np.ndarray, " spans"]
    """Its own so far, each halved by every half-life since: refocuses that showed a block of it by choice, or had one
    as a candidate that scored no less than what they showed, as they do with what is pruned."""
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
    policy: CurationPolicy,
    *,
    now: float,
    event_folders: Sequence[Path] = (),
) -> Usage:
    """Read focus events, and a context's versions.

    Args:
        reader: of the version that is looked at.
        documents: of that version.
        policy: how soon uses are forgotten, and what a document says of its spans.
        now: unix seconds; events and versions after it are left out.
        event_folders: folders of the contexts whose sessions may have read this one: a session writes its events to its
            own context. None is the context itself alone.
    """
    num_spans = reader.version.num_blocks // BLOCKS_PER_SUPER_BLOCK
    events = pa.concat_tables([read_focus_events(folder) for folder in event_folders or [reader.folder]])
    uses, last_used = _uses(events, reader, num_spans, now, policy.half_life_days)
    stored_at = _stored_at(reader, num_spans)
    states = reader.block_states(0, num_spans * BLOCKS_PER_SUPER_BLOCK).reshape(num_spans, -1)
    starts = np.array([document.first_block for document in documents], np.int64)
    first = np.arange(num_spans, dtype=np.int64) * BLOCKS_PER_SUPER_BLOCK
    document = np.searchsorted(starts, first, side="right") - 1
    last_document = np.searchsorted(starts, first + BLOCKS_PER_SUPER_BLOCK - 1, side="right") - 1
    grows = bool(documents) and documents[-1].state == "open"
    return Usage(
        expected_uses(uses, (now - stored_at) / DAY_S, document, policy),
        uses,
        np.maximum(last_used, stored_at),
        stored_at,
        states.min(axis=1) if num_spans else np.zeros(0, np.int8),
        (last_document == len(documents) - 1) & grows,
        document,
        last_document,
    )


def expected_uses(
    uses: Float64[np.ndarray, " spans"],
    age_days: Float64[np.ndarray, " spans"],
    document: Int64[np.ndarray, " spans"],
    policy: CurationPolicy,
) -> Float64[np.ndarray, " spans"]:
    """Utility: the span's own uses a day, shrunk towards the mean of its document's spans.

    A span's own uses are few and chance has a large part in them; with its document's it is judged as an insurer judges
    a customer of a group (Bühlmann 1967, "Experience rating and credibility": the own mean weighs `n / (n + k)`).

    Args:
        uses: of each span, halved by every half-life.
        age_days: since it was stored.
        document: which document it is of, any numbers.
        policy: half-life, and the weight of the document.
    """
    if len(uses) == 0:
        return np.zeros(0)
    half_life = policy.half_life_days
    # Days that uses were counted in, days past weighing as little as uses past: what is new is not taken for unused.
    watched = (1 - 0.5 ** (np.maximum(age_days, MIN_WATCHED_DAYS) / half_life)) * half_life / np.log(2)
    _, group = np.unique(document, return_inverse=True)
    youngest = np.full(group.max() + 1, np.inf)
    np.minimum.at(youngest, group, np.maximum(age_days, 0.0))
    stored = policy.storing_uses * 0.5 ** (youngest / half_life)
    mean = ((np.bincount(group, uses) + stored) / np.bincount(group, watched))[group]
    return UTILITY_DAYS * (uses + policy.document_days * mean) / (watched + policy.document_days)


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
