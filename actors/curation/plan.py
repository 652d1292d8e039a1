"""From usage to a plan: what a policy does with every span, and what that saves."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from actors.curation.usage import DAY_S, Usage
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from cluster.curation_config import CurationPolicy
from cluster.errors import ConfigError
from storage.contract import BlockState, DocumentInfo, Version

Action = Literal["archive", "compact", "delete", "restore"]
ACTIONS: tuple[Action, ...] = get_args(Action)

SPAN_BYTES = SLOTS_PER_SUPER_BLOCK * 4
"""Raw tokens of a span."""

PLAN_FORMAT = 1


@dataclass(frozen=True)
class PlannedSpan:
    """What happens to one span, and why."""

    action: Action
    first_block: int
    num_blocks: int
    document: str
    """Key of the document of its first block, by which a plan that has become stale is recognised."""
    uri: str
    utility: float
    idle_days: float


@dataclass(frozen=True)
class CurationPlan:
    """What is to be done with a context, made from one version of it."""

    context: str
    branch: str
    branch_id: int
    version: int
    made_at: float
    """Unix seconds."""
    retention_days: float
    archive_days: float
    spans: list[PlannedSpan]
    kept: dict[str, int]
    """Spans that stay as they are, by reason."""

    def of(self, action: Action) -> list[PlannedSpan]:
        """The spans it does this to."""
        return [span for span in self.spans if span.action == action]

    @property
    def saved_bytes(self) -> int:
        """Of raw tokens, once the retention is over, less those that come back."""
        return SPAN_BYTES * sum(-1 if span.action == "restore" else 1 for span in self.spans)

    def write(self, path: Path) -> None:
        """As JSON, a span a line, to be read and edited by people: a line that is taken out is not done."""
        body = asdict(self)
        spans = ",\n".join(json.dumps(span) for span in body.pop("spans"))
        head = json.dumps({"format": PLAN_FORMAT, **body}, indent=1)
        path.write_text(f'{head[:-2]},\n "spans": [\n{spans}\n]}}\n')

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a plan.

        Raises:
            ConfigError: no plan, or one of another format; says what is wrong with it.
        """
        try:
            body: dict[str, Any] = json.loads(path.read_text())
            found = body.pop("format")
            if found != PLAN_FORMAT:
                raise ConfigError(f"{path} has format {found}; this program reads {PLAN_FORMAT}. Make the plan again.")
            spans = [PlannedSpan(**span) for span in body.pop("spans")]
            unknown = {span.action for span in spans} - set(ACTIONS)
            if unknown:
                raise ConfigError(f"{path} has action {sorted(unknown)[0]!r}; use {', '.join(ACTIONS)}")
            return cls(**body, spans=spans)
        except OSError as error:
            raise ConfigError(f"plan {path} cannot be read: {error}. `curate plan` writes one") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no plan: {error!r}. `curate plan` writes one") from error


def make_plan(
    version: Version, documents: Sequence[DocumentInfo], usage: Usage, policy: CurationPolicy, *, now: float
) -> CurationPlan:
    """Decide about every complete span of a version.

    A span is protected when any of its documents is. Documents are deleted as a whole, so only spans that hold nothing
    else go with them.

    Args:
        version: what is looked at.
        documents: its documents.
        usage: over its spans.
        policy: the rules.
        now: unix seconds.
    """
    idle_days = (now - usage.last_used) / DAY_S
    age_days = (now - usage.stored_at) / DAY_S
    protected = _any_document(usage, np.array([_is_protected(d, policy) for d in documents], bool))
    pruned = np.isin(usage.state, (BlockState.GIST_ONLY, BlockState.TOMBSTONED))
    free = ~protected & ~usage.is_open & ~pruned
    movable = free & (age_days >= policy.min_age_days)
    useless = movable & (usage.utility < policy.keep_utility)
    deleted = _deleted(usage, len(documents), free & (age_days >= policy.delete_days), idle_days, policy)
    compacted = useless & (usage.utility < policy.compact_utility) & ~deleted
    archived = useless & ~compacted & ~deleted
    if policy.quota_mb:
        over = (~pruned & ~deleted & ~compacted & ~archived).sum() * SPAN_BYTES - policy.quota_mb * 1e6
        rest = np.flatnonzero(movable & ~useless & ~deleted)
        order = rest[np.lexsort((usage.last_used[rest], usage.utility[rest]))]
        archived[order[: max(0, int(np.ceil(over / SPAN_BYTES)))]] = True
    restored = pruned & (usage.utility >= policy.restore_utility) & (policy.restore_utility > 0)
    chosen: dict[Action, np.ndarray] = {
        "archive": archived,
        "compact": compacted,
        "delete": deleted,
        "restore": restored,
    }
    spans = [
        PlannedSpan(
            action,
            int(span) * BLOCKS_PER_SUPER_BLOCK,
            BLOCKS_PER_SUPER_BLOCK,
            documents[usage.document[span]].meta.key,
            documents[usage.document[span]].meta.uri,
            round(float(usage.utility[span]), 4),
            round(float(idle_days[span]), 2),
        )
        for action, mask in chosen.items()
        for span in np.flatnonzero(mask)
    ]
    acted = np.logical_or.reduce(list(chosen.values()))
    reasons = {
        "pruned already": pruned,
        "protected": protected,
        "still growing": usage.is_open,
        "young": age_days < policy.min_age_days,
        "useful": np.ones(len(usage), bool),
    }
    kept, left = {}, ~acted
    for reason, mask in reasons.items():
        kept[reason] = int((left & mask).sum())
        left &= ~mask
    return CurationPlan(
        version.context,
        version.branch,
        version.branch_id,
        version.seq,
        now,
        policy.retention_days,
        policy.archive_days,
        sorted(spans, key=lambda span: span.first_block),
        kept,
    )


def _is_protected(document: DocumentInfo, policy: CurationPolicy) -> bool:
    by_tag = not set(policy.protected_tags).isdisjoint(document.meta.tags)
    return by_tag or any(fnmatch.fnmatchcase(document.meta.uri, glob) for glob in policy.protected_documents)


def _any_document(usage: Usage, of_document: np.ndarray) -> np.ndarray:
    """Whether any document that a span has a block of is marked."""
    if len(of_document) == 0:
        return np.zeros(len(usage), bool)
    before = np.concatenate([[0], np.cumsum(of_document)])
    return before[usage.last_document + 1] > before[usage.document]


def _deleted(
    usage: Usage, num_documents: int, old: np.ndarray, idle_days: np.ndarray, policy: CurationPolicy
) -> np.ndarray:
    """Spans of documents that are deleted as a whole."""
    if policy.delete_days == 0 or num_documents == 0:
        return np.zeros(len(usage), bool)
    stays = ~(old & (idle_days >= policy.delete_days))
    kept = np.zeros(num_documents + 1, np.int64)
    # Every document between a span's first and last has a block of it.
    np.add.at(kept, usage.document[stays], 1)
    np.add.at(kept, usage.last_document[stays] + 1, -1)
    return ~stays & ~_any_document(usage, np.cumsum(kept[:-1]) > 0)
