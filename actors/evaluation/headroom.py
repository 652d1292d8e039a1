"""Several evaluations of focus side by side: cells of kind of text, length of history and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.results import FocusResults
from actors.evaluation.samples import files_of_run, read_samples
from actors.evaluation.statistics import Estimate, clustered_mean, ratio_of_means
from cluster.config_parser import parse_job
from cluster.errors import ConfigError
from cluster.evaluation_config import EvaluateFocusJob, FocusEvaluationConfig

Sample = tuple[Place, list[Measured]]

ALL_KINDS = "all"

FREE_KEYS = ("num_places", "first_place", "budgets", "rivals", "forms", "num_workers", "threads_per_worker")
"""Of `evaluation`: what is measured and by how many, not how. Runs may differ in them and still be one."""


@dataclass(frozen=True)
class FocusRun:
    """What one run of `evaluate focus` measured."""

    kind: str
    """Of text."""
    evaluation: FocusEvaluationConfig
    """What it was measured with."""
    samples: list[Sample]

    @classmethod
    def read(cls, kind: str, folder: Path) -> FocusRun:
        """From the run's folder.

        Raises:
            ConfigError: there is no such run, not exactly one file of samples in it, or its recipe has keys that an
                evaluation of focus has no longer.
        """
        recipe, file = files_of_run(folder, "evaluate focus")
        try:
            evaluation = parse_job(EvaluateFocusJob, ["--config", str(recipe)]).evaluation
        except ConfigError as error:
            raise ConfigError(f"{recipe} is no recipe of `evaluate focus`: {error}") from error
        # Documents of two corpora may have one name.
        samples = [(_of_kind(kind, place), measured) for place, measured in read_samples(file, Place, Measured)]
        return cls(kind, evaluation, samples)


def _of_kind(kind: str, place: Place) -> Place:
    return Place(place.number, f"{kind}:{place.uri}", place.first_block, place.stop_block)


@dataclass(frozen=True)
class Cell:
    """All places of one kind of text (or all kinds), length and budget."""

    kind: str
    history_tokens: int
    budget: int
    results: FocusResults

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.kind}, {self.history_tokens:,} / {self.budget:,}"

    @property
    def num_places(self) -> int:
        return len(self.results.samples)

    def has(self, *conditions: str) -> bool:
        """Whether all of them were measured."""
        return all(self.results.has(condition, self.budget) for condition in conditions)

    def gain(self, condition: str, over: str, where: np.ndarray | None = None) -> Estimate:
        """On the half of the tokens that no oracle chose on, nats a token; positive is better."""
        return self.results.gain(condition, over, self.budget, "scoring", where)

    def optimistic_gain(self, condition: str, over: str) -> Estimate:
        """On the half an oracle chose on: what it won there, luck included."""
        return self.results.gain(condition, over, self.budget, "choosing")

    def readings(self, oracle: str) -> list[int]:
        """After how many readings to look at an oracle: 0, 2, 4, 8, ... until none found anything more; none of them
        where it was not told how it came to its choice."""
        steps = self._steps(oracle)
        last = max((step[0] for of_place in steps for step in of_place), default=-1)
        looks = [0] if last >= 0 else []
        while looks and looks[-1] < last:
            looks.append(2 * looks[-1] or 2)
        return looks

    def after(self, num_readings: int, oracle: str, over: str) -> tuple[Estimate, float]:
        """An oracle that had stopped after so many readings: gain on the half it did not choose on, and mean number of
        blocks it shows."""
        best = [next(s for s in reversed(steps) if s[0] <= num_readings) for steps in self._steps(oracle)]
        gained = self.results.nll(over, self.budget, "scoring") - np.array([step[3] for step in best])
        return clustered_mean(gained, self.results.documents), float(np.mean([step[1] for step in best]))

    def _steps(self, oracle: str) -> list[list[tuple[int, int, float, float]]]:
        """Of every place; empty where a place lacks them."""
        steps = [m.steps for m in self.results.column(oracle, self.budget)] if self.has(oracle) else []
        return steps if all(steps) else []

    def num_chosen(self, condition: str) -> np.ndarray:
        """Blocks chosen at each place."""
        return np.array([len(m.picked) for m in self.results.column(condition, self.budget)])

    def ages(self, condition: str) -> np.ndarray:
        """Age in blocks of every chosen block, a place after another."""
        picks = self.results.picks(condition, self.budget)
        return np.array([place.stop_block - block for place, blocks in picks for block in blocks], np.int64)

    def picked_share(self, condition: str, what: str) -> Estimate:
        """Share of chosen blocks with `num_same_document` or `num_shared_names`."""
        column = self.results.column(condition, self.budget)
        counted = np.array([getattr(m, what) for m in column], float)
        return ratio_of_means(counted, self.num_chosen(condition).astype(float), self.results.documents)

    def chance(self, condition: str, what: str) -> Estimate:
        """What `picked_share` would be, had chance picked as many of the blocks there were."""
        column = self.results.column(condition, self.budget)
        share = {"num_same_document": "share_same_document", "num_shared_names": "share_shared_names"}[what]
        counts = self.num_chosen(condition).astype(float)
        return ratio_of_means(np.array([getattr(m, share) for m in column]) * counts, counts, self.results.documents)

    @cached_property
    def conditions(self) -> list[str]:
        """All that every place has."""
        return self.results.conditions(self.budget)

    def where_full_wins(self, over: str, least: float) -> np.ndarray:
        """Places where, on the choosing half, the full history gains at least so much: bool."""
        return self.results.where_full_wins(over, self.budget, least)


def cells_of(runs: Sequence[FocusRun]) -> list[Cell]:
    """Cells of every run, and of all kinds together where several kinds were measured at one length and budget.

    What two runs of one kind measured at the same place stands side by side: budgets and conditions may be measured one
    after the other.

    Raises:
        ConfigError: runs of one kind and length whose numbers do not compare, having been measured in different ways.
    """
    groups: dict[tuple[int, str], list[FocusRun]] = {}
    for run in runs:
        groups.setdefault((run.evaluation.history_tokens, run.kind), []).append(run)
    by_size: dict[tuple[int, int], dict[str, list[Sample]]] = {}
    for (history_tokens, kind), members in sorted(groups.items(), key=lambda group: group[0][0]):
        _require_alike(members)
        samples = _side_by_side([sample for run in members for sample in run.samples])
        for budget in FocusResults.of(samples).budgets:
            there = [(place, found) for place, found in samples if any(m.budget == budget for m in found)]
            by_size.setdefault((history_tokens, budget), {})[kind] = there
    cells: list[Cell] = []
    for (history_tokens, budget), kinds in sorted(by_size.items()):
        if len(kinds) > 1:
            kinds[ALL_KINDS] = [sample for samples in kinds.values() for sample in samples]
        cells += [
            Cell(kind, history_tokens, budget, FocusResults.of(_shared(samples, budget)))
            for kind, samples in kinds.items()
        ]
    return cells


def _require_alike(runs: Sequence[FocusRun]) -> None:
    first, *others = ({**asdict(run.evaluation), **dict.fromkeys(FREE_KEYS)} for run in runs)
    for other in others:
        if differing := sorted(key for key in first if first[key] != other[key]):
            raise ConfigError(
                f"two runs of {runs[0].kind!r} at {first['history_tokens']:,} tokens of history differ in "
                f"evaluation.{', evaluation.'.join(differing)}; give them kinds of different names"
            )


def _side_by_side(samples: Sequence[Sample]) -> list[Sample]:
    """Each place once, with everything that was measured there."""
    places: dict[tuple[str, int, int], Place] = {}
    measured: dict[tuple[str, int, int], dict[tuple[str, int], Measured]] = {}
    for place, found in samples:
        key = (place.uri, place.first_block, place.stop_block)
        places.setdefault(key, place)
        for m in found:
            measured.setdefault(key, {}).setdefault((m.condition, m.budget), m)
    return [(place, list(measured[key].values())) for key, place in places.items()]


def _shared(samples: Sequence[Sample], budget: int) -> list[Sample]:
    """Of each place the conditions of a budget that all places have."""
    names = [{(m.condition, m.budget) for m in measured if m.budget in {0, budget}} for _, measured in samples]
    shared = set.intersection(*names)
    return [(place, [m for m in measured if (m.condition, m.budget) in shared]) for place, measured in samples]
