"""What curation does to a context, where its writer is: in the job's own process or in an actor of the store's service.

Every piece looks at the tree first, so that one that is done again after a lost answer does nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.curation.plan import Action, PlannedSpan
from actors.curation.usage import DAY_S
from cluster.errors import ConfigError, DiskFullError, NodeMissingError, StorageError, WriterConflictError
from storage.contract import BlockState
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter
from storage.versions.curation import Restored, expire_archives, prune, restore


@dataclass(frozen=True)
class Order:
    """One commit of a plan: an action on a few spans."""

    action: Action
    spans: Sequence[PlannedSpan]
    branch: str
    branch_id: int
    """Which branch had its name when the plan was made."""
    version: int
    """That the plan was made of."""
    retention_days: float
    archive_days: float
    now: float
    """Unix seconds, from which retention counts."""


@dataclass
class Carried:
    """What came of an order."""

    done: int = 0
    """Spans."""
    there_already: int = 0
    """Spans that were as planned before."""
    stale: list[int] = field(default_factory=list)
    """First blocks of spans that are of another document now, or of one that grows: left alone."""
    lost: list[str] = field(default_factory=list)
    """Why spans could not be restored."""
    commits: int = 0


@dataclass(frozen=True)
class Collected:
    """What garbage collection freed."""

    token_bytes: int
    """Of pruned tokens."""
    archive_bytes: int
    """Of archives whose time was over."""


def carry_out(store: Store, writer: ContextWriter, order: Order) -> Carried:
    """Carry out an order, but for spans that have changed since the plan.

    Raises:
        ConfigError: the plan was made of another branch than has its name now.
        DiskFullError, StorageError: nothing was changed, or for a restore what is said in the tree.
    """
    del store
    if writer.branch.branch_id != order.branch_id:
        raise ConfigError(
            f"branch {order.branch!r} of context {writer.name!r} was rolled back, or its documents were removed, since "
            "the plan was made. Make the plan again."
        )
    target = {"delete": BlockState.TOMBSTONED, "restore": BlockState.WHOLE}.get(order.action, BlockState.GIST_ONLY)
    carried = Carried()
    with writer.reader() as reader:
        open_from = _first_open_block(reader)
        spans: list[tuple[int, int]] = []
        for span in order.spans:
            if not _is_current(span, reader) or span.first_block + span.num_blocks > open_from:
                carried.stale.append(span.first_block)
            elif (reader.block_states(span.first_block, span.num_blocks) == target).all():
                carried.there_already += 1
            else:
                spans.append((span.first_block, span.num_blocks))
    if not spans:
        return carried
    message = f"curate {order.action}, by the plan of version {order.version}"
    if order.action == "restore":
        spans = _restore_each(spans, writer, message, carried)
    else:
        archive_until = None
        if order.action == "archive":
            archive_until = order.now + order.archive_days * DAY_S if order.archive_days else 0.0
        keep_until = order.now + order.retention_days * DAY_S
        prune(
            writer,
            spans,
            state=target,
            keep_until=keep_until,
            archive_until=archive_until,
            message=message,
            now=order.now,
        )
    carried.done = len(spans)
    carried.commits = 1
    return carried


def bring_back(store: Store, writer: ContextWriter, spans: Sequence[tuple[int, int]], message: str) -> Restored:
    """As `storage.versions.curation.restore`."""
    del store
    return restore(writer, spans, message=message)


def collect(store: Store, writer: ContextWriter, keep_s: float, now: float) -> Collected:
    """Garbage collection, and the end of archives that are kept no longer.

    Raises:
        StorageError: as `Store.collect`.
    """
    garbage = store.collect(writer, keep_s=keep_s, now=now)
    return Collected(garbage.token_bytes, expire_archives(writer, now))


WORK: Mapping[str, Callable[..., Any]] = {work.__name__: work for work in (carry_out, bring_back, collect)}
"""By name, as it is asked for of an actor."""


def _restore_each(
    spans: list[tuple[int, int]], writer: ContextWriter, message: str, carried: Carried
) -> list[tuple[int, int]]:
    """Restore what can be; returns those spans."""
    try:
        restore(writer, spans, message=message)
        return spans
    except (DiskFullError, WriterConflictError):
        raise
    except StorageError:
        # One that is kept nowhere must not keep the others away.
        done = []
        for span in spans:
            try:
                restore(writer, [span], message=message)
                done.append(span)
            except (DiskFullError, WriterConflictError):
                # They may be restored yet: by the same command, later.
                raise
            except StorageError as error:
                carried.lost.append(str(error))
        return done


def _is_current(span: PlannedSpan, reader: ContextReader) -> bool:
    try:
        document = reader.document_at(span.first_block)
    except NodeMissingError:
        return False
    return document.meta.key == span.document and span.first_block + span.num_blocks <= reader.version.num_blocks


def _first_open_block(reader: ContextReader) -> int:
    num_blocks = reader.version.num_blocks
    last = reader.document_at(num_blocks - 1) if num_blocks else None
    return last.first_block if last is not None and last.state == "open" else num_blocks
