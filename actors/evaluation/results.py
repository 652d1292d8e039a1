"""What an evaluation of focus found, place by place, and what it says in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.rivals import FULL, NONE
from actors.evaluation.samples import SampleLog
from actors.evaluation.statistics import Estimate, clustered_mean, ratio_of_means

Half = Literal["both", "choosing", "scoring"]


class SampleFile(SampleLog[Place, Measured]):
    """The samples of an evaluation of focus."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Place, Measured)


@dataclass(frozen=True)
class FocusResults:
    """All places of one evaluation, in the order of their numbers."""

    samples: list[tuple[Place, list[Measured]]]

    @classmethod
    def of(cls, samples: Iterable[tuple[Place, list[Measured]]]) -> FocusResults:
        """Sorted, so that the numbers do not depend on which worker was faster."""
        return cls(sorted(samples, key=lambda sample: sample[0].number))

    @cached_property
    def _columns(self) -> dict[tuple[str, int], list[Measured]]:
        columns: dict[tuple[str, int], list[Measured]] = {}
        for _, measured in self.samples:
            for m in measured:
                columns.setdefault((m.condition, m.budget), []).append(m)
        return columns

    @property
    def budgets(self) -> list[int]:
        """Budgets that were compared."""
        return sorted({budget for _, budget in self._columns if budget})

    def conditions(self, budget: int) -> list[str]:
        """Conditions of a budget in the order they were measured, with those that have none."""
        return [name for name, b in self._columns if b in {0, budget}]

    def column(self, condition: str, budget: int) -> list[Measured]:
        """One condition at every place; those without a budget under any."""
        return self._columns.get((condition, budget)) or self._columns[condition, 0]

    def has(self, condition: str, budget: int = 0) -> bool:
        """Whether it was measured."""
        return (condition, budget) in self._columns or (condition, 0) in self._columns

    @cached_property
    def documents(self) -> list[str]:
        """Document of each place: the clusters of standard errors."""
        return [place.uri for place, _ in self.samples]

    def nll(self, condition: str, budget: int, half: Half = "both") -> np.ndarray:
        """`(places,)` nats a token."""
        name = {"both": "nll", "choosing": "nll_choosing", "scoring": "nll_scoring"}[half]
        return np.array([getattr(m, name) for m in self.column(condition, budget)])

    def mean(self, condition: str, budget: int, half: Half = "both", where: np.ndarray | None = None) -> Estimate:
        """Mean NLL."""
        return self._over(self.nll(condition, budget, half), where)

    def gain(
        self, condition: str, over: str, budget: int, half: Half = "both", where: np.ndarray | None = None
    ) -> Estimate:
        """NLL of `over` minus NLL of `condition`, paired: positive is better."""
        return self._over(self.nll(over, budget, half) - self.nll(condition, budget, half), where)

    def recovered_fraction(self, condition: str, budget: int) -> Estimate | None:
        """mean(none - condition) / mean(none - full); None where either was not measured."""
        if not (self.has(NONE) and self.has(FULL)):
            return None
        none = self.nll(NONE, budget)
        return ratio_of_means(none - self.nll(condition, budget), none - self.nll(FULL, budget), self.documents)

    def share_of(self, condition: str, best: str, over: str, budget: int, half: Half) -> Estimate:
        """What a condition wins over another, as a share of what `best` wins over it."""
        base = self.nll(over, budget, half)
        won, ceiling = base - self.nll(condition, budget, half), base - self.nll(best, budget, half)
        return ratio_of_means(won, ceiling, self.documents)

    def where_full_wins(self, over: str, budget: int, least: float) -> np.ndarray:
        """Places where, on the choosing half, the full history gains at least so much over a condition: bool."""
        gain = self.nll(over, budget, "choosing") - self.nll(FULL, budget, "choosing")
        return gain >= least

    def picks(self, condition: str, budget: int) -> list[tuple[Place, list[int]]]:
        """Blocks a condition chose at each place."""
        places = [place for place, _ in self.samples]
        return list(zip(places, (m.picked for m in self.column(condition, budget)), strict=True))

    def median(self, condition: str, budget: int, name: Literal["slots", "decide_s", "read_s"]) -> float:
        """Median over places of a number that is no NLL."""
        return float(np.median([getattr(m, name) for m in self.column(condition, budget)]))

    def _over(self, values: np.ndarray, where: np.ndarray | None) -> Estimate:
        if where is None:
            return clustered_mean(values, self.documents)
        chosen = [uri for uri, yes in zip(self.documents, where, strict=True) if yes]
        return clustered_mean(values[where], chosen)

    def as_report(self) -> list[dict[str, Any]]:
        """One entry a condition and budget, for `report.json`."""
        entries = []
        for condition, budget in self._columns:
            entry: dict[str, Any] = {"condition": condition, "budget": budget}
            for half in ("both", "choosing", "scoring"):
                estimate = self.mean(condition, budget, half)
                entry[f"nll_{half}"] = estimate.mean
                entry[f"nll_{half}_se"] = estimate.standard_error
            entry["slots"] = self.median(condition, budget, "slots")
            entry["decide_s"] = self.median(condition, budget, "decide_s")
            entry["read_s"] = self.median(condition, budget, "read_s")
            entries.append(entry)
        return entries
