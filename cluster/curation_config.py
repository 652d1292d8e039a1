"""Configuration of the jobs that curate a context; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import RayConfig, RunConfig, StoreConfig, TrackingConfig, require


@dataclass(frozen=True)
class CurationPolicy:
    """What is kept in detail. A span is a super-block, 1,024 slots; its utility is how many refocuses of the next 30
    days are expected to show a block of it by choice, from those that did, or would have, so far."""

    half_life_days: float = 45.0
    """A use counts half after so many days."""
    document_days: float = 60.0
    """A span is judged as if it had been watched for so many days more, in which it was used as the spans of its
    document are on average. 0: by its own uses alone."""
    storing_uses: float = 0.4
    """Storing a document counts as so many uses of it, forgotten like others: not all that is wanted is asked for in
    its first week."""
    min_age_days: float = 7.0
    """What was stored less than so many days ago is kept."""
    keep_utility: float = 0.6
    """A span is kept from this utility on. Spans of a long document have it with three uses of late, those of a
    short one with two, and with one while it is new."""
    compact_utility: float = 0.0
    """Spans with less than this are compacted without an archive: once `retention_days` are over their tokens are gone.
    0: every pruned span is archived."""
    quota_mb: float = 0.0
    """Raw tokens that stay in detail at most, in MB; the least useful spans go first. 0: no limit."""
    delete_days: float = 0.0
    """A document of which nothing was used for so many days, and that is as old, is tombstoned: no detail of it is
    shown any more, and its tokens go without an archive when `retention_days` are over. 0: never."""
    retention_days: float = 7.0
    """Tokens of pruned spans stay where they are for so many days."""
    archive_days: float = 0.0
    """An archive is removed after so many days; 0 keeps it for ever."""
    restore_utility: float = 0.7
    """A pruned span is restored from this utility on: refocuses that would have shown it count as uses. Somewhat more
    than `keep_utility`, so that spans do not come and go. 0: never."""
    protected_tags: list[str] = field(default_factory=list)
    """Tags of documents that are never touched (`corpus.tags` when they were read)."""
    protected_documents: list[str] = field(default_factory=list)
    """Globs of URIs that are never touched."""

    def validate(self) -> None:
        for name in (
            "document_days",
            "storing_uses",
            "min_age_days",
            "keep_utility",
            "compact_utility",
            "quota_mb",
            "delete_days",
            "retention_days",
        ):
            require(getattr(self, name) >= 0, f"policy.{name}={getattr(self, name)} must not be negative")
        require(self.half_life_days > 0, f"policy.half_life_days={self.half_life_days} must be more than 0")
        for name in ("archive_days", "restore_utility"):
            require(
                getattr(self, name) >= 0, f"policy.{name}={getattr(self, name)} must not be negative; 0 switches it off"
            )
        require(
            self.compact_utility <= self.keep_utility,
            f"policy.compact_utility={self.compact_utility} must not be above keep_utility={self.keep_utility}",
        )


@dataclass(frozen=True)
class CurationPace:
    """How fast a plan is carried out beside what else writes to the context."""

    spans_per_commit: int = 64
    """Spans of a commit. After a kill at most one commit is done again."""
    pause_s: float = 0.05
    """Seconds between commits."""
    wait_s: float = 600.0
    """Seconds to wait for another writer of the context to end before giving up."""

    def validate(self) -> None:
        require(self.spans_per_commit >= 1, f"pace.spans_per_commit={self.spans_per_commit} must be at least 1")
        require(self.pause_s >= 0, f"pace.pause_s={self.pause_s} must not be negative")
        require(self.wait_s >= 0, f"pace.wait_s={self.wait_s} must not be negative")


@dataclass(frozen=True)
class CurateReportJob:
    """What of a context is used: utility and age of its spans, what is pruned and archived, as tables and plots."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    policy: CurationPolicy = field(default_factory=CurationPolicy)
    """Half-life, weight of documents and thresholds."""


@dataclass(frozen=True)
class CuratePlanJob:
    """Write a plan: what a policy would do with each span, why, and what that saves. Changes nothing."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the plan and the report go: `plan.json` in the run's folder."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    policy: CurationPolicy = field(default_factory=CurationPolicy)
    """What is kept."""


@dataclass(frozen=True)
class CurateApplyJob:
    """Carry out a plan, in small commits with pauses; the same command goes on after a stop. Without `apply` it says
    what it would do."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster whose store service writes, where one runs; none is started."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch; those of the plan."""
    plan: Path = Path()
    """The `plan.json` of `curate plan`."""
    pace: CurationPace = field(default_factory=CurationPace)
    """How fast."""
    apply: bool = False
    """Do it."""

    def validate(self) -> None:
        require(self.plan != Path(), "plan is empty; give the plan.json that `curate plan` wrote")


@dataclass(frozen=True)
class CurateRestoreJob:
    """Bring pruned tokens back, bit for bit: those still in the tree, and those of archives. Without `apply` it says
    what it would bring back."""

    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster whose store service writes, where one runs; none is started."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    documents: list[str] = field(default_factory=list)
    """URIs, or globs of them. None and no span: everything."""
    first_block: int = 0
    """Only from this block of the timeline on."""
    num_blocks: int = 0
    """Only so many blocks; 0 is all."""
    pace: CurationPace = field(default_factory=CurationPace)
    """How long to wait for another writer."""
    apply: bool = False
    """Do it."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.first_block >= 0, f"first_block={self.first_block} must not be negative")
        require(self.num_blocks >= 0, f"num_blocks={self.num_blocks} must not be negative")


@dataclass(frozen=True)
class CurateWatchJob:
    """Plan, apply and collect again and again, for days, beside ingest and sessions. Ends by SIGTERM or Ctrl-C after
    the commit it is in."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where plans and the report go."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster whose store service writes, where one runs; none is started."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    policy: CurationPolicy = field(default_factory=CurationPolicy)
    """What is kept."""
    pace: CurationPace = field(default_factory=CurationPace)
    """How fast."""
    every_s: float = 3600.0
    """Seconds from the beginning of a round to that of the next."""
    rounds: int = 0
    """End after so many; 0 goes on."""
    keep_days: float = 14.0
    """As in `tree gc`: how long a version can be gone back to."""

    def validate(self) -> None:
        require(self.every_s > 0, f"every_s={self.every_s} must be more than 0")
        require(self.rounds >= 0, f"rounds={self.rounds} must not be negative")
        require(self.keep_days >= 0, f"keep_days={self.keep_days} must not be negative")
