"""What an evaluation on tasks found, and what it says in all.

Means are over the samples that are feasible in a condition's form and budget; standard errors know which samples
belong together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.evaluation.rivals import WITHOUT_FORM
from actors.evaluation.samples import SampleLog
from actors.evaluation.statistics import Estimate, clustered_mean
from actors.evaluation.task_evaluator import TaskMeasured
from actors.evaluation.task_places import TASK_DEPTH, TaskPlace

Metric = Literal["correct", "exact", "answer_nll", "recall"]
METRICS: tuple[Metric, ...] = ("correct", "exact", "answer_nll", "recall")

NUM_DEPTH_BINS = 5
"""Parts of the history that samples are shared out to, where depths are the tasks' own."""


class TaskSampleFile(SampleLog[TaskPlace, TaskMeasured]):
    """The samples of an evaluation on tasks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, TaskPlace, TaskMeasured)


@dataclass(frozen=True)
class Cell:
    """Samples that are looked at together; what is None is not asked for."""

    condition: str
    budget: int
    task: str | None = None
    history_tokens: int | None = None
    depth: float | None = None
    """A row of `TaskResults.depths`."""


@dataclass(frozen=True)
class TaskResults:
    """All places of one evaluation, in the order of their numbers."""

    samples: list[tuple[TaskPlace, list[TaskMeasured]]]

    @classmethod
    def of(cls, samples: Iterable[tuple[TaskPlace, list[TaskMeasured]]]) -> TaskResults:
        """Sorted, so that the numbers do not depend on which worker was faster."""
        return cls(sorted(samples, key=lambda sample: sample[0].number))

    @cached_property
    def _columns(self) -> dict[tuple[str, int], list[tuple[TaskPlace, TaskMeasured]]]:
        columns: dict[tuple[str, int], list[tuple[TaskPlace, TaskMeasured]]] = {}
        for place, measured in self.samples:
            for m in measured:
                columns.setdefault((m.condition, m.budget), []).append((place, m))
        return columns

    @property
    def budgets(self) -> list[int]:
        """Budgets that were compared; 0 alone where no condition has one."""
        return sorted({budget for _, budget in self._columns if budget}) or [0]

    @cached_property
    def tasks(self) -> list[str]:
        """In the order they were asked."""
        return list(dict.fromkeys(place.task for place, _ in self.samples))

    @cached_property
    def lengths(self) -> list[int]:
        """Slots of history, ascending."""
        return sorted({place.history_tokens for place, _ in self.samples})

    @cached_property
    def depths(self) -> list[float]:
        """Rows of a heat map: the depths that were set, or the middles of equal parts of the history."""
        given = sorted({place.depth_percent for place, _ in self.samples})
        if given != [TASK_DEPTH]:
            return [percent / 100 for percent in given]
        return [(part + 0.5) / NUM_DEPTH_BINS for part in range(NUM_DEPTH_BINS)]

    def conditions(self, budget: int) -> list[str]:
        """Conditions of a budget in the order they were measured, those that have none first."""
        return [name for name, b in self._columns if b in {0, budget}]

    def members(self, cell: Cell) -> list[TaskMeasured]:
        """What was measured of a cell's samples."""
        budget = 0 if cell.condition in WITHOUT_FORM else cell.budget
        return [
            m
            for place, m in self._columns.get((cell.condition, budget), [])
            if cell.task in {None, place.task}
            and cell.history_tokens in {None, place.history_tokens}
            and cell.depth in {None, self._depth(place, m)}
        ]

    def _depth(self, place: TaskPlace, m: TaskMeasured) -> float:
        if place.depth_percent != TASK_DEPTH:
            return place.depth_percent / 100
        return self.depths[min(int(m.depth * NUM_DEPTH_BINS), NUM_DEPTH_BINS - 1)]

    def mean(self, metric: Metric, cell: Cell) -> Estimate:
        """Mean over the feasible samples of a cell that have the metric; of none, NaN."""
        chosen = [m for m in self.members(cell) if m.feasible and getattr(m, metric) is not None]
        return clustered_mean(np.array([getattr(m, metric) for m in chosen], float), [m.cluster for m in chosen])

    def num_infeasible(self, cell: Cell) -> tuple[int, int]:
        """Infeasible samples of a cell, and all."""
        members = self.members(cell)
        return sum(not m.feasible for m in members), len(members)

    def median(self, name: Literal["slots", "decide_s", "read_s"], cell: Cell) -> float:
        """Median over a cell's samples; NaN of none."""
        values = [getattr(m, name) for m in self.members(cell)]
        return float(np.median(values)) if values else float("nan")

    def chance(self, task: str) -> float:
        """Accuracy of guessing among a task's candidates."""
        shares = [1 / measured[0].num_candidates for place, measured in self.samples if place.task == task]
        return float(np.mean(shares))

    def as_report(self) -> list[dict[str, Any]]:
        """One entry a condition, budget, task and length, for `report.json`."""
        entries = []
        for condition, budget in self._columns:
            for task in self.tasks:
                for length in self.lengths:
                    cell = Cell(condition, budget, task, length)
                    infeasible, num = self.num_infeasible(cell)
                    if not num:
                        continue
                    entry: dict[str, Any] = {
                        "task": task,
                        "history_tokens": length,
                        "condition": condition,
                        "budget": budget,
                        "num_samples": num,
                        "num_infeasible": infeasible,
                        "slots": self.median("slots", cell),
                    }
                    for metric in METRICS:
                        estimate = self.mean(metric, cell)
                        if estimate.num_samples:
                            entry |= {metric: estimate.mean, f"{metric}_se": estimate.standard_error}
                    entries.append(entry)
        return entries
