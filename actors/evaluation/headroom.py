"""Several evaluations of focus side by side: cells of kind of text, length of history and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.results import FocusResults
from actors.evaluation.samples import read_samples
from actors.evaluation.statistics import Estimate, ratio_of_means
from cluster.errors import ConfigError

Sample = tuple[Place, list[Measured]]

ALL_KINDS = "all"


@dataclass(frozen=True)
class FocusRun:
    """What one run of `evaluate focus` measured."""

    kind: str
    """Of text."""
    history_tokens: int
    samples: list[Sample]

    @classmethod
    def read(cls, kind: str, folder: Path) -> FocusRun:
        """From the run's folder.

        Raises:
            ConfigError: there is no such run, or not exactly one file of samples in it.
        """
        recipe = folder / "config.yaml"
        files = sorted([*folder.glob("samples-*.jsonl"), *folder.glob("samples-*.jsonl.gz")])
        if not recipe.exists() or len(files) != 1:
            found = f"{len(files)} files of samples" if recipe.exists() else "no config.yaml"
            raise ConfigError(f"{folder} is no run of `evaluate focus` with one file of samples: it holds {found}")
        evaluation = yaml.safe_load(recipe.read_text())["evaluation"]
        # Documents of two corpora may have one name.
        samples = [(_of_kind(kind, place), measured) for place, measured in read_samples(files[0], Place, Measured)]
        return cls(kind, int(evaluation["history_tokens"]), samples)


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
    """Cells of every run, and of all kinds together where several kinds were measured at one length and budget."""
    by_size: dict[tuple[int, int], dict[str, list[Sample]]] = {}
    for run in runs:
        for budget in FocusResults.of(run.samples).budgets:
            kinds = by_size.setdefault((run.history_tokens, budget), {})
            kinds.setdefault(run.kind, []).extend(run.samples)
    cells: list[Cell] = []
    for (history_tokens, budget), kinds in sorted(by_size.items()):
        groups = {kind: _shared(samples, budget) for kind, samples in kinds.items()}
        if len(kinds) > 1:
            groups[ALL_KINDS] = _shared([sample for samples in kinds.values() for sample in samples], budget)
        cells += [Cell(kind, history_tokens, budget, FocusResults.of(samples)) for kind, samples in groups.items()]
    return cells


def _shared(samples: Sequence[Sample], budget: int) -> list[Sample]:
    """Of each place the conditions of a budget that all places have; each place once."""
    names = [{(m.condition, m.budget) for m in measured if m.budget in {0, budget}} for _, measured in samples]
    shared = set.intersection(*names)
    unique = {(place.uri, place.first_block, place.stop_block): (place, measured) for place, measured in samples}
    return [(place, [m for m in measured if (m.condition, m.budget) in shared]) for place, measured in unique.values()]
