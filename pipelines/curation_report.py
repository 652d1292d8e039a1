"""Tables and plots of curation: what is used, what is planned, what was done, and what there is now."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actors.curation.apply import Applied
from actors.curation.plan import ACTIONS, SPAN_BYTES, CurationPlan
from actors.curation.usage import DAY_S, Usage, folder_bytes
from cluster.config import StoreConfig
from cluster.curation_config import CurationPolicy
from cluster.plots import figure
from cluster.tables import Table
from storage.contract import BlockState
from storage.store import Store
from storage.tree.sealing import SEGMENT_FOLDER
from storage.versions.archive import ARCHIVE_FOLDER

UTILITY_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, np.inf)

WHAT_IT_DOES = {
    "archive": "tokens to an archive, gists stay",
    "compact": "tokens go, gists stay",
    "delete": "tombstoned: tokens go, no detail is shown",
    "restore": "tokens come back",
}


def state_numbers(store: Store, config: StoreConfig) -> dict[str, Any]:
    """Blocks by state of a branch's newest version, and bytes of its context."""
    folder = store.folder(config.context)
    with store.open_reader(config.context, config.version) as reader:
        states = reader.block_states(0, reader.version.num_blocks)
    shards = (folder / SEGMENT_FOLDER).glob("*/lod0/tokens/**/*")
    tokens = sum(path.stat().st_size for path in shards if path.is_file() and path.name != "zarr.json")
    archive = folder / ARCHIVE_FOLDER
    return {
        "blocks_by_state": {state.name.lower(): int((states == state).sum()) for state in BlockState},
        "token_bytes_sealed": tokens,
        "archive_bytes": folder_bytes(archive) if archive.is_dir() else 0,
        "context_bytes": folder_bytes(folder),
    }


def usage_numbers(usage: Usage, policy: CurationPolicy) -> dict[str, Any]:
    """The machine-readable report."""
    return {
        "spans": len(usage),
        "spans_useful": int((usage.utility >= policy.keep_utility).sum()),
        "spans_never_used": int((usage.uses == 0).sum()),
    }


def states_table(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> Table:
    """What there is of a context, before and after."""
    rows = [
        _row(f"{name.replace('_', '-')} blocks", before, after, "blocks_by_state", name)
        for name in before["blocks_by_state"]
    ]
    for name, what in (
        ("token_bytes_sealed", "bytes of raw tokens in segments"),
        ("archive_bytes", "bytes of archives"),
        ("context_bytes", "bytes of the context"),
    ):
        rows.append(_row(what, before, after, name))
    return Table(rows, "What there is")


def _row(what: str, before: Mapping[str, Any], after: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    def value(of: Mapping[str, Any]) -> Any:
        found: Any = of
        for key in keys:
            found = found[key]
        return found

    if after is None:
        return {"what": what, "now": value(before)}
    return {"what": what, "before": value(before), "after": value(after)}


def spans_table(usage: Usage, policy: CurationPolicy) -> Table:
    """Spans by utility, uses expected in 30 days."""
    rows = []
    for low, high in itertools.pairwise(UTILITY_EDGES):
        inside = (usage.utility >= low) & (usage.utility < high)
        label = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} up"
        rows.append(
            {
                "utility": label,
                "spans": int(inside.sum()),
                "MB of tokens": inside.sum() * SPAN_BYTES / 1e6,
                "pruned": int((inside & (usage.state != BlockState.WHOLE)).sum()),
            }
        )
    return Table(rows, f"Spans of 1,024 slots by uses expected in 30 days (kept from {policy.keep_utility:g})")


def actions_table(plan: CurationPlan) -> Table:
    """What is planned."""
    rows = []
    for action in ACTIONS:
        spans = plan.of(action)
        sign = -1 if action == "restore" else 1
        rows.append(
            {
                "action": action,
                "what it does": WHAT_IT_DOES[action],
                "spans": len(spans),
                "documents": len({span.document for span in spans}),
                "MB of tokens freed": sign * len(spans) * SPAN_BYTES / 1e6,
            }
        )
    return Table(rows, f"Planned for version {plan.version} of {plan.context}")


def kept_table(plan: CurationPlan) -> Table:
    """What stays as it is, and why."""
    rows = [{"why": why, "spans": count, "MB of tokens": count * SPAN_BYTES / 1e6} for why, count in plan.kept.items()]
    return Table(rows, "Stays as it is")


def applied_table(applied: Applied) -> Table:
    """What was done."""
    rows = [{"what": action, "spans": count} for action, count in applied.done.items()]
    rows += [
        {"what": "as planned already", "spans": applied.there_already},
        {"what": "changed since the plan: left alone", "spans": len(applied.stale)},
        {"what": "kept nowhere any more: not restored", "spans": len(applied.lost)},
    ]
    return Table(rows, f"Done, in {applied.commits} commits")


def plot_usage(usage: Usage, policy: CurationPolicy, now: float, path: Path, plan: CurationPlan | None = None) -> None:
    """Utility by age, a point a span, and along the timeline."""
    age = (now - usage.stored_at) / DAY_S
    floor = 1e-3
    chosen = np.full(len(usage), "stays", object)
    for span in plan.spans if plan is not None else ():
        chosen[span.first_block // (span.num_blocks or 1)] = span.action
    with figure(path, num_columns=2, size=(11.0, 4.0)) as (by_age, line):
        for action in ("stays", *ACTIONS):
            mine = chosen == action
            if mine.any():
                label = action if plan is not None else None
                by_age.scatter(age[mine], np.maximum(usage.utility[mine], floor), s=6, alpha=0.5, label=label)
        by_age.set(xlabel="days since it was stored", ylabel="utility", yscale="log", title="Spans by age")
        by_age.axhline(policy.keep_utility, color="#4a5568", linewidth=0.8, linestyle="--")
        if plan is not None:
            by_age.legend()
        line.plot(np.arange(len(usage)), np.maximum(usage.utility, floor), linewidth=0.6)
        pruned = np.flatnonzero(usage.state != BlockState.WHOLE)
        line.scatter(pruned, np.full(len(pruned), floor), s=4, color="#c05621", label="pruned")
        line.set(
            xlabel="span of the timeline (1,024 slots)", ylabel="utility", yscale="log", title="Along the timeline"
        )
        if len(pruned):
            line.legend()
