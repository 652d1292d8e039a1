"""What curation does to a context: tokens of spans are pruned, and brought back for as long as they are kept.

Pruning adds a version in which spans have another state; no byte moves. Collection takes the tokens later, when
no kept version uses them and the time to go back is over, by writing segments anew without them. Until then
restoring adds another version; after that it takes the tokens from an archive, if one was written.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import StorageError
from storage.contract import BlockState, PrunedSpan, Version
from storage.geometry import NO_TOKEN
from storage.schema import Encoding
from storage.tree import journal, sealing
from storage.tree.journal import Level
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED, Span, as_spans
from storage.tree.writer import ContextWriter
from storage.versions.archive import Archives, Place, places_of


@dataclass(frozen=True)
class Restored:
    """What was brought back."""

    version: Version
    blocks: int
    from_archive: int
    """Of those, blocks whose tokens had been collected."""


def prune(
    writer: ContextWriter,
    spans: Sequence[Span],
    *,
    keep_until: float,
    state: BlockState = BlockState.GIST_ONLY,
    archive_until: float | None = None,
    message: str = "",
    now: float | None = None,
) -> Version:
    """Take the tokens of spans of blocks out of the newest version of the writer's branch.

    Args:
        writer: on the branch.
        spans: `(first block, number of blocks)`, apart from each other. Blocks that are pruned already get the new
            state and times.
        keep_until: unix seconds; until then the tokens stay where they are, and `restore` needs no archive.
        state: GIST_ONLY, or TOMBSTONED for what is not to be shown in detail.
        archive_until: unix seconds, 0 for ever: write the tokens to an archive first. None writes none.
        message: kept with the version and in the audit log.
        now: unix seconds; None asks the clock.

    Raises:
        InvalidWriteError: spans outside the version, or that overlap.
        StorageError: a span of a document that is still growing; nothing was pruned.
        DiskFullError, StorageError: the disk refused; nothing was pruned.
    """
    with writer.reader() as reader:
        num_blocks = reader.version.num_blocks
        last = reader.document_at(num_blocks - 1) if num_blocks else None
        if last is not None and last.state == "open" and any(n + count > last.first_block for n, count in spans):
            raise StorageError(f"document {last.meta.key!r} is still growing; what grows is not pruned")
        if archive_until is not None:
            Archives(writer.folder).add(reader, spans, keep_until=archive_until, now=now)
    pruned = [PrunedSpan(first, count, state, keep_until) for first, count in spans]
    with writer.lock:
        with writer.commit() as db:
            writer.set_states(db, pruned, "prune", message)
        writer.reload()
        return writer.version()


def restore(writer: ContextWriter, spans: Sequence[Span], *, message: str = "") -> Restored:
    """Bring the tokens of spans back, bit for bit; blocks that are whole are left alone.

    Raises:
        StorageError: the tokens of some blocks are kept nowhere any more; nothing was changed.
        CorruptTreeError: an archive is damaged.
    """
    with writer.sealer.paused(), writer.lock:
        with writer.reader() as reader:
            wanted = np.zeros(reader.version.num_blocks, bool)
            for first, count in spans:
                states = reader.block_states(first, count)
                wanted[first : first + count] = np.isin(states, PRUNED)
            if not wanted.any():
                return Restored(writer.version(), 0, 0)
            gone = _gone(reader, as_spans(wanted))
            tokens = _archived(writer, reader, gone)
        returned = [PrunedSpan(first, count, BlockState.WHOLE, 0.0) for first, count in as_spans(wanted)]
        replaced: list[str] = []
        with contextlib.ExitStack() as stack, writer.commit() as db:
            if tokens:
                replaced = _put_back(stack, db, writer, tokens)
            writer.set_states(db, returned, "restore", message)
        writer.reload()
    sealing.remove_folders(writer.folder, replaced)
    return Restored(writer.version(), int(wanted.sum()), len(tokens))


def expire_archives(writer: ContextWriter, now: float | None = None) -> int:
    """Remove archives that are kept no longer; returns their bytes. The audit log says so."""
    removed = Archives(writer.folder).expire(time.time() if now is None else now)
    if removed:
        with writer.commit() as db:
            writer.audit(db, "expire_archives", {"bytes": removed})
    return removed


def _gone(reader: ContextReader, spans: Sequence[Span]) -> list[int]:
    """Blocks of the spans whose tokens are not in the tree any more."""
    found: list[int] = []
    for first, count in spans:
        tokens = reader.stored_arrays(0, first, count)["tokens"].reshape(count, K)
        found += (first + np.flatnonzero(tokens[:, 0] == NO_TOKEN)).tolist()
    return found


def _archived(writer: ContextWriter, reader: ContextReader, gone: Sequence[int]) -> dict[int, np.ndarray]:
    """Tokens of blocks, from the archives."""
    if not gone:
        return {}
    places: dict[int, Place] = {}
    for block in gone:
        if block not in places:
            document = reader.document_at(block)
            mine = [other for other in gone if 0 <= other - document.first_block < document.num_blocks]
            places |= dict(zip(mine, places_of(reader, document, mine), strict=True))
    found = Archives(writer.folder).find(set(places.values()))
    counts = reader.stored_arrays(0, gone[0], gone[-1] - gone[0] + 1)["num_tokens"].reshape(-1)
    lost = [
        block
        for block, place in places.items()
        if place not in found or int((found[place] != NO_TOKEN).sum()) != counts[block - gone[0]]
    ]
    if lost:
        document = reader.document_at(lost[0])
        raise StorageError(
            f"the tokens of {len(lost)} block(s) are kept nowhere any more, the first of them block "
            f"{lost[0] - document.first_block} of document {document.meta.key!r}; nothing was restored. Restore what "
            "is left by naming its documents, and ingest the others from their source as new ones"
        )
    return {block: found[place] for block, place in places.items()}


def _put_back(
    stack: contextlib.ExitStack, db: sqlite3.Connection, writer: ContextWriter, tokens: dict[int, np.ndarray]
) -> list[str]:
    """Write segments, and rows of the journal, anew with the tokens of some blocks; returns the folders replaced."""
    replaced: list[str] = []
    for part in writer.lineage.block_parts():
        stop = 2**62 if part.stop is None else part.stop
        mine = {block: values for block, values in tokens.items() if part.first <= block < stop}
        if mine:
            replaced += _replace_segments(stack, db, writer, part.level, mine)
            _replace_rows(db, writer, part.level, mine)
    return replaced


def _replace_segments(
    stack: contextlib.ExitStack,
    db: sqlite3.Connection,
    writer: ContextWriter,
    level: Level,
    tokens: dict[int, np.ndarray],
) -> list[str]:
    replaced: list[str] = []
    encodings = {row[0]: Encoding.from_json(row[1]) for row in db.execute("SELECT encoding_id, body FROM encodings")}
    found = db.execute(
        "SELECT e.segment_id, s.folder, e.first, e.count FROM extents e JOIN segments s USING (segment_id) "
        "WHERE branch_id = ? AND encoding_id = ? AND lod = ? ORDER BY e.first",
        level.key,
    ).fetchall()
    for segment_id, folder, first, count in found:
        if not any(first <= block < first + count for block in tokens):
            continue
        parts = []
        for branch_id, encoding_id, lod, start, size in db.execute(
            "SELECT branch_id, encoding_id, lod, first, count FROM extents WHERE segment_id = ? ORDER BY lod",
            (segment_id,),
        ).fetchall():
            if encoding_id == journal.BLOCKS:
                held = journal.block_level(branch_id)
            else:
                held = journal.gist_level(branch_id, encoding_id, encodings[encoding_id], lod)
            arrays = sealing.read_part(writer.folder, folder, held, size, size)
            if held.key == level.key:
                for block in range(start, start + size):
                    if block in tokens:
                        arrays["tokens"][block - start] = tokens[block]
            parts.append(sealing.Part(held, start, size, arrays))
        sealed = stack.enter_context(writer.sealer.written(parts))
        db.execute("DELETE FROM extents WHERE segment_id = ?", (segment_id,))
        db.execute("DELETE FROM segments WHERE segment_id = ?", (segment_id,))
        sealed.record(db)
        replaced.append(folder)
    return replaced


def _replace_rows(db: sqlite3.Connection, writer: ContextWriter, level: Level, tokens: dict[int, np.ndarray]) -> None:
    rows = db.execute(
        "SELECT row_id, first, count FROM journal WHERE branch_id = ? AND encoding_id = ? AND lod = ?", level.key
    ).fetchall()
    for row_id, first, count in rows:
        mine = [block for block in range(first, first + count) if block in tokens]
        if not mine:
            continue
        run = journal.load(db, level, row_id)
        assert run is not None
        arrays = {name: values.copy() for name, values in run.arrays.items()}
        for block in mine:
            arrays["tokens"][block - first] = tokens[block]
        db.execute("DELETE FROM journal WHERE row_id = ?", (row_id,))
        journal.insert(db, level, first, count, arrays, writer.row_ids)
