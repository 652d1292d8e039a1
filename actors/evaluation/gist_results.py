"""What an evaluation of gists found, over all places: paired, with standard errors clustered by document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from actors.evaluation.gist_evaluator import FULL, MEAN_GIST, NONE, OWN, SHUFFLED, Condition, Measured
from actors.evaluation.places import Place
from actors.evaluation.samples import SampleLog
from actors.evaluation.statistics import Estimate, clustered_mean, ratio_of_means


class GistSampleFile(SampleLog[Place, Measured]):
    """The samples of an evaluation of gists."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Place, Measured)


@dataclass(frozen=True)
class Curve:
    """Mean by position in the horizon, and its standard error."""

    mean: Float64[np.ndarray, " positions"]
    standard_error: Float64[np.ndarray, " positions"]


@dataclass(frozen=True)
class Setting:
    """Level of the gists and length of the raw tail: conditions of one setting have equal cost."""

    lod: int
    tail_tokens: int


@dataclass(frozen=True)
class GistResults:
    """All places of one evaluation, in the order of their numbers."""

    samples: list[tuple[Place, list[Measured]]]

    @classmethod
    def of(cls, samples: Iterable[tuple[Place, list[Measured]]]) -> GistResults:
        """Sorted, so that the numbers do not depend on which worker was faster."""
        return cls(sorted(samples, key=lambda sample: sample[0].number))

    @cached_property
    def _columns(self) -> dict[Condition, list[Measured]]:
        columns: dict[Condition, list[Measured]] = {}
        for _, measured in self.samples:
            for m in measured:
                columns.setdefault(m.condition, []).append(m)
        return columns

    @cached_property
    def documents(self) -> list[str]:
        """Document of each place: the clusters of standard errors."""
        return [place.uri for place, _ in self.samples]

    @property
    def conditions(self) -> list[Condition]:
        """All, in the order they were measured."""
        return list(self._columns)

    @property
    def settings(self) -> list[Setting]:
        """Levels and tails, in the order they were measured."""
        return list(dict.fromkeys(Setting(c.lod, c.tail_tokens) for c in self._columns if c.lod))

    @property
    def sources(self) -> list[str]:
        """Whose gists were measured, the tree's first."""
        suffix = f"/{OWN}"
        return list(dict.fromkeys(c.name.removesuffix(suffix) for c in self._columns if c.name.endswith(suffix)))

    def conditions_of(self, setting: Setting) -> list[Condition]:
        """Full, nothing but the tail, and what costs as much as the setting's gists."""
        shared = [Condition(FULL), Condition(NONE, 0, setting.tail_tokens)]
        return shared + [c for c in self._columns if (c.lod, c.tail_tokens) == (setting.lod, setting.tail_tokens)]

    def tokens_nll(self, condition: Condition) -> Float64[np.ndarray, "places positions"]:
        """NLL of every token that is scored."""
        return np.array([m.nll for m in self._columns[condition]])

    def nll(self, condition: Condition) -> Float64[np.ndarray, " places"]:
        """Nats a token."""
        return self.tokens_nll(condition).mean(axis=1)

    def mean(self, condition: Condition) -> Estimate:
        """Mean NLL."""
        return clustered_mean(self.nll(condition), self.documents)

    def difference(self, condition: Condition, other: Condition) -> Estimate:
        """Mean NLL of a condition minus that of another, paired."""
        return clustered_mean(self.nll(condition) - self.nll(other), self.documents)

    def delta_nll(self, condition: Condition) -> Estimate:
        """ΔNLL@H: NLL minus that of the full raw history."""
        return self.difference(condition, Condition(FULL))

    def content_nats(self, source: str, setting: Setting) -> Estimate:
        """Shuffled minus own: what gists say of their own history; positive is good."""
        return self.difference(*(_of(source, kind, setting) for kind in (SHUFFLED, OWN)))

    def best_constant(self, source: str, setting: Setting) -> Condition:
        """The vector that is the same everywhere and harms least: the source's mean gist, or what a net makes that
        says the same of everything. A mean alone flatters: in place of 32 gists it can be far worse than nothing."""
        constants = [_of(source, MEAN_GIST, setting)]
        for other in self.sources:
            own = _of(other, OWN, setting)
            if all(m.spread == 0 for m in self._columns[own]):
                constants.append(own)
        return min(constants, key=lambda condition: self.mean(condition).mean)

    def gain_over_constant(self, source: str, setting: Setting) -> Estimate:
        """The best constant minus own gists; positive is good."""
        return self.difference(self.best_constant(source, setting), _of(source, OWN, setting))

    def recovered_fraction(self, condition: Condition) -> Estimate:
        """mean(none - condition) / mean(none - full), none having the same raw tail; NaN when full gains nothing."""
        none = self.nll(Condition(NONE, 0, condition.tail_tokens))
        return ratio_of_means(none - self.nll(condition), none - self.nll(Condition(FULL)), self.documents)

    def curve(self, condition: Condition, other: Condition) -> Curve:
        """`difference` by position in the horizon; the first scored token is at position 1."""
        differences = self.tokens_nll(condition) - self.tokens_nll(other)
        estimates = [clustered_mean(column, self.documents) for column in differences.T]
        return Curve(np.array([e.mean for e in estimates]), np.array([e.standard_error for e in estimates]))

    def content_curve(self, source: str, setting: Setting) -> Curve:
        """`content_nats` by position in the horizon."""
        return self.curve(*(_of(source, kind, setting) for kind in (SHUFFLED, OWN)))

    def spread(self, source: str, lod: int) -> Estimate | None:
        """Share of a gist's mean square that tells it from the mean gist; None for a level that was not measured."""
        column = next((self._columns[c] for c in self._columns if (c.name, c.lod) == (f"{source}/{OWN}", lod)), None)
        return None if column is None else clustered_mean(np.array([m.spread for m in column]), self.documents)

    def slots(self, condition: Condition) -> int:
        """Rows of a condition, the same at every place."""
        return self._columns[condition][0].slots

    def as_report(self) -> list[dict[str, Any]]:
        """One entry a condition, for `report.json`; content and gains stand with own gists."""
        entries = []
        for condition in self.conditions:
            entry: dict[str, Any] = {
                "condition": condition.name,
                "lod": condition.lod,
                "tail_tokens": condition.tail_tokens,
                "slots": self.slots(condition),
            }
            source, _, kind = condition.name.rpartition("/")
            numbers = {"nll": self.mean(condition), "delta_nll": self.delta_nll(condition)}
            if kind == OWN:
                setting = Setting(condition.lod, condition.tail_tokens)
                numbers = {
                    "content_nats": self.content_nats(source, setting),
                    "gain_over_constant": self.gain_over_constant(source, setting),
                    **numbers,
                }
            if condition.name not in {FULL, NONE}:
                numbers["recovered_fraction"] = self.recovered_fraction(condition)
            for name, estimate in numbers.items():
                entry[name] = estimate.mean
                entry[f"{name}_se"] = estimate.standard_error
            entry["delta_nll_by_position"] = self.curve(condition, Condition(FULL)).mean.round(6).tolist()
            entries.append(entry)
        return entries


def _of(source: str, kind: str, setting: Setting) -> Condition:
    return Condition(f"{source}/{kind}", setting.lod, setting.tail_tokens)
