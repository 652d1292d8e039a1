"""Configuration of `train ablations`; same rules as `config`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import RayConfig, RunConfig, TrackingConfig, require

DEFAULT = "default"
"""The variant that every other one is compared with: recipe and common keys, nothing else."""


@dataclass(frozen=True)
class AblationsConfig:
    """Which runs of `train gistnet` are put side by side."""

    recipe: str = "configs/train_gistnet.yaml"
    """Recipe of `train gistnet` that all runs begin with."""

    common: dict[str, Any] = field(default_factory=dict)
    """Keys of `train gistnet` with their values that hold in all runs, for example `training.num_steps: 200`."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """The same once more, for the command line: what stands here wins over `common`, key by key, as in
    `--ablations.overrides '{training.num_steps: 50}'`. What a variant changes wins over both."""

    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Question, name of a variant, and the keys it changes. `gistnet.path: variant:NAME` begins with the net of another
    variant, which is trained first."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Every variant is trained once with each: of the net's weights, the order of windows and their cuts."""

    only: list[str] = field(default_factory=list)
    """Variants or groups to do, with what they begin with and what they are compared with; empty: all."""

    def validate(self) -> None:
        require(bool(self.recipe), "ablations.recipe must name a recipe of train gistnet")
        require(bool(self.groups), "ablations.groups is empty; give a recipe, for example configs/ablations.yaml")
        require(bool(self.seeds), "ablations.seeds must name at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), f"ablations.seeds={self.seeds} names one twice")
        names = [name for variants in self.groups.values() for name in variants]
        taken = [DEFAULT, *names, *self.groups]
        for name in (*self.groups, *names):
            plain = bool(name) and all(c.isalnum() or c in "-_." for c in name) and name[0] not in ".-"
            require(plain, f"ablations.groups holds {name!r}; letters, digits, '-', '_' and '.' make a name")
            require(
                taken.count(name) == 1,
                f"ablations.groups names {name!r} twice; groups and variants have names of their own, and "
                f"{DEFAULT!r} is what they are compared with",
            )
        for changes in (
            self.common,
            self.overrides,
            *(c for variants in self.groups.values() for c in variants.values()),
        ):
            for key, value in changes.items():
                require(
                    not isinstance(value, dict),
                    f"ablations: {key!r} holds the mapping {value}; write dotted keys, as in '{{training.seed: 1}}'",
                )
        for name in self.only:
            require(name in taken, f"ablations.only names {name!r}{_hint(name, taken)}")


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"{meant} Groups and variants: {', '.join(known)}"


@dataclass(frozen=True)
class TrainAblationsJob:
    """Train a GistNet in many variants, one switch at a time, and compare what comes out on the same windows."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes; the variants' own runs lie in the same folder."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster of every run."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    ablations: AblationsConfig = field(default_factory=AblationsConfig)
    """Which runs."""
