"""Carrying out a plan: a commit of a few spans, a pause, the next, each for itself, so that others can write between.

What is done is seen in the tree, so the same plan goes on after any stop and does nothing twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from actors.curation.plan import ACTIONS, Action, CurationPlan, PlannedSpan
from actors.curation.usage import DAY_S
from cluster.curation_config import CurationPace
from cluster.errors import ConfigError, DiskFullError, NodeMissingError, StorageError, WriterConflictError
from storage.contract import BlockState
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter
from storage.versions.curation import prune, restore

RETRY_S = 0.5
"""Between attempts to become the writer."""


@dataclass
class Applied:
    """What was done."""

    done: dict[Action, int] = field(default_factory=lambda: dict.fromkeys(ACTIONS, 0))
    """Spans, by action."""
    there_already: int = 0
    """Spans that were as planned before."""
    stale: list[int] = field(default_factory=list)
    """First blocks of spans that are of another document now, or of one that grows: left alone."""
    lost: list[str] = field(default_factory=list)
    """Why spans could not be restored."""
    commits: int = 0
    waited_s: float = 0.0
    """For other writers of the context."""


@contextlib.contextmanager
def writing(
    store: Store, context: str, branch: str, owner: str, wait_s: float, on_wait: Callable[[float], None] | None = None
) -> Iterator[ContextWriter]:
    """The context's writer, as soon as nobody else is.

    Raises:
        WriterConflictError: somebody else was for all of `wait_s`.
    """
    begun = time.monotonic()
    writer: ContextWriter | None = None
    while writer is None:
        try:
            writer = store.open_maintenance(context, branch, owner)
        except WriterConflictError:
            if time.monotonic() - begun >= wait_s:
                raise
            if on_wait is not None:
                on_wait(wait_s)
                on_wait = None
            time.sleep(min(RETRY_S, wait_s))
    with writer:
        yield writer


def apply_plan(
    plan: CurationPlan,
    store: Store,
    pace: CurationPace,
    owner: str,
    *,
    now: float,
    on_progress: Callable[[int], None] = lambda _spans: None,
    on_wait: Callable[[float], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Applied:
    """Do what a plan says, until `stopping`.

    Args:
        plan: of a context of the store.
        store: where it is.
        pace: how fast.
        owner: who writes, for those who are refused meanwhile.
        now: unix seconds, from which retention counts.
        on_progress: is told of every so many spans that are done with.
        on_wait: is told once when another writer has to be waited for, for how long at most.
        stopping: asked between commits.

    Raises:
        ConfigError: the plan was made of another branch than has its name now.
        WriterConflictError, DiskFullError, StorageError: what was committed stays done; the same call goes on.
    """
    applied = Applied()
    for action in ACTIONS:
        spans = plan.of(action)
        for start in range(0, len(spans), pace.spans_per_commit):
            if stopping():
                return applied
            batch = spans[start : start + pace.spans_per_commit]
            begun = time.monotonic()
            with writing(store, plan.context, plan.branch, owner, pace.wait_s, on_wait) as writer:
                applied.waited_s += time.monotonic() - begun
                _check_branch(plan, writer)
                _commit(plan, action, batch, writer, now, applied)
            on_progress(len(batch))
            time.sleep(pace.pause_s)
    return applied


def _check_branch(plan: CurationPlan, writer: ContextWriter) -> None:
    if writer.branch.branch_id != plan.branch_id:
        raise ConfigError(
            f"branch {plan.branch!r} of context {plan.context!r} was rolled back, or its documents were removed, since "
            "the plan was made. Make the plan again."
        )


def _commit(
    plan: CurationPlan,
    action: Action,
    batch: Sequence[PlannedSpan],
    writer: ContextWriter,
    now: float,
    applied: Applied,
) -> None:
    target = {"delete": BlockState.TOMBSTONED, "restore": BlockState.WHOLE}.get(action, BlockState.GIST_ONLY)
    with writer.reader() as reader:
        open_from = _first_open_block(reader)
        spans: list[tuple[int, int]] = []
        for span in batch:
            if not _is_current(span, reader) or span.first_block + span.num_blocks > open_from:
                applied.stale.append(span.first_block)
            elif (reader.block_states(span.first_block, span.num_blocks) == target).all():
                applied.there_already += 1
            else:
                spans.append((span.first_block, span.num_blocks))
    if not spans:
        return
    message = f"curate {action}, by the plan of version {plan.version}"
    if action == "restore":
        spans = _restore_each(spans, writer, message, applied)
    else:
        archive_days = plan.archive_days
        archive_until = None
        if action == "archive":
            archive_until = now + archive_days * DAY_S if archive_days else 0.0
        keep_until = now + plan.retention_days * DAY_S
        prune(writer, spans, state=target, keep_until=keep_until, archive_until=archive_until, message=message, now=now)
    applied.done[action] += len(spans)
    applied.commits += 1


def _restore_each(
    spans: list[tuple[int, int]], writer: ContextWriter, message: str, applied: Applied
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
                applied.lost.append(str(error))
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
