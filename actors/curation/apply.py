"""Carrying out a plan: a commit of a few spans, a pause, the next, each for itself, so that others can write between.

What is done is seen in the tree, so the same plan goes on after any stop and does nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.curation.curator import Curator
from actors.curation.plan import ACTIONS, Action, CurationPlan
from actors.curation.work import Carried, Order, carry_out
from cluster.curation_config import CurationPace


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

    def add(self, action: Action, carried: Carried) -> None:
        """Count what came of an order."""
        self.done[action] += carried.done
        self.there_already += carried.there_already
        self.stale += carried.stale
        self.lost += carried.lost
        self.commits += carried.commits


def apply_plan(
    plan: CurationPlan,
    curator: Curator,
    pace: CurationPace,
    *,
    now: float,
    on_progress: Callable[[int], None] = lambda _spans: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Applied:
    """Do what a plan says, until `stopping`.

    Args:
        plan: of the curator's context and branch.
        curator: does it.
        pace: how fast.
        now: unix seconds, from which retention counts.
        on_progress: is told of every so many spans that are done with.
        stopping: asked between commits.

    Raises:
        ConfigError: the plan was made of another branch than has its name now.
        WriterConflictError, DiskFullError, StorageError: what was committed stays done; the same call goes on.
    """
    applied = Applied()
    waited_before = curator.waited_s
    for action in ACTIONS:
        spans = plan.of(action)
        for start in range(0, len(spans), pace.spans_per_commit):
            if stopping():
                return applied
            batch = spans[start : start + pace.spans_per_commit]
            order = Order(
                action,
                batch,
                plan.branch,
                plan.branch_id,
                plan.version,
                plan.retention_days,
                plan.archive_days,
                now,
            )
            applied.add(action, curator.run(carry_out, order))
            applied.waited_s = curator.waited_s - waited_before
            on_progress(len(batch))
            time.sleep(pace.pause_s)
    return applied
