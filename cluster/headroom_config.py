"""Configuration of `evaluate headroom`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import RunConfig, TrackingConfig, require


@dataclass(frozen=True)
class HeadroomConfig:
    """Which runs are read together."""

    runs: list[str] = field(default_factory=list)
    """`kind=folder` of each run of `evaluate focus`: the kind of text, and the run's folder, for example
    `code=runs/focus-code`. A folder holds `config.yaml` and one samples file, which may be packed (`.jsonl.gz`)."""

    base: str = "recency/raw"
    """What gains are over."""

    oracle: str = "oracle/raw"
    """What gains are a share of."""

    def validate(self) -> None:
        require(bool(self.runs), "headroom.runs must name at least one run, for example '[code=runs/focus-code]'")
        for run in self.runs:
            kind, equals, folder = run.partition("=")
            sound = bool(kind and equals and folder)
            require(sound, f"headroom.runs holds {run!r}; write kind=folder, as in code=runs/focus-code")


@dataclass(frozen=True)
class EvaluateHeadroomJob:
    """How much there is to win by choosing what is shown, and who wins it: several runs of `evaluate focus` as one."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    headroom: HeadroomConfig = field(default_factory=HeadroomConfig)
    """Which runs."""
