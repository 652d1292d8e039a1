"""What curation cost: numbers before and after, paired by place or question, standard errors by document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from actors.curation.effect_evaluator import Answered, Predicted
from actors.curation.effect_places import WHERE, EffectQuestion, Where
from actors.evaluation.places import Place
from actors.evaluation.samples import SampleLog
from actors.evaluation.statistics import Estimate, clustered_mean

ANSWER_METRICS = ("correct", "answer_nll", "shown")


class PredictedFile(SampleLog[Place, Predicted]):
    """Held positions of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Place, Predicted)


class AnsweredFile(SampleLog[EffectQuestion, Answered]):
    """Questions of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, EffectQuestion, Answered)


@dataclass(frozen=True)
class Paired:
    """One number in both versions."""

    before: Estimate
    after: Estimate
    change: Estimate
    """After minus before, paired."""
    num_changed: int
    """Samples for which it is not the same."""

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], documents: Sequence[str]) -> Paired:
        """Of samples in the same order."""
        one, two = np.asarray(before, np.float64), np.asarray(after, np.float64)
        return cls(
            clustered_mean(one, documents),
            clustered_mean(two, documents),
            clustered_mean(two - one, documents),
            int((one != two).sum()),
        )

    def as_report(self, name: str) -> dict[str, Any]:
        """Entries for `report.json`."""
        return {
            f"{name}_before": self.before.mean,
            f"{name}_after": self.after.mean,
            f"{name}_change": self.change.mean,
            f"{name}_change_se": self.change.standard_error,
        }


@dataclass(frozen=True)
class EffectResults:
    """All places and questions of one comparison, in the order of their numbers."""

    predicted: list[tuple[Place, list[Predicted]]]
    answered: list[tuple[EffectQuestion, list[Answered]]]

    @classmethod
    def of(
        cls,
        predicted: Iterable[tuple[Place, list[Predicted]]],
        answered: Iterable[tuple[EffectQuestion, list[Answered]]],
    ) -> EffectResults:
        """Sorted, so that the numbers do not depend on which worker was faster."""
        return cls(
            sorted(predicted, key=lambda sample: sample[0].number),
            sorted(answered, key=lambda sample: sample[0].number),
        )

    @cached_property
    def conditions(self) -> list[str]:
        """Who chose, and in which form it was shown."""
        measured = [m for _, of in self.predicted[:1] for m in of] or [m for _, of in self.answered[:1] for m in of]
        return list(dict.fromkeys(m.condition for m in measured))

    def nll(self, condition: str) -> Paired:
        """Of held positions, nats a token."""
        sides = {
            side: [m.nll for _, of in self.predicted for m in of if (m.side, m.condition) == (side, condition)]
            for side in ("before", "after")
        }
        return Paired.of(sides["before"], sides["after"], [place.uri for place, _ in self.predicted])

    def picked(self, condition: str) -> tuple[float, float]:
        """Blocks a condition chose at a held position, before and after, in the mean."""
        before, after = (
            [m.picked for _, of in self.predicted for m in of if (m.side, m.condition) == (side, condition)]
            for side in ("before", "after")
        )
        return float(np.mean(before)), float(np.mean(after))

    def answer(self, metric: str, condition: str, where: Where) -> Paired:
        """Of the questions that could have been shown before; `metric` is one of `ANSWER_METRICS`."""
        before: list[float] = []
        after: list[float] = []
        documents: list[str] = []
        for question, of in self.answered:
            mine = {m.side: m for m in of if m.condition == condition}
            if question.where == where and mine["before"].feasible:
                before.append(float(getattr(mine["before"], metric)))
                after.append(float(getattr(mine["after"], metric)))
                documents.append(mine["before"].document)
        return Paired.of(before, after, documents)

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the candidates; NaN where nothing was asked."""
        shares = [1 / of[0].num_candidates for _, of in self.answered]
        return float(np.mean(shares)) if shares else math.nan

    def num_infeasible(self, where: Where) -> int:
        """Questions no chooser could have shown all needed blocks of, even before, in some form."""
        return sum(q.where == where and not all(m.feasible for m in of) for q, of in self.answered)

    def as_report(self) -> dict[str, Any]:
        """The machine-readable report."""
        predictions = [{"condition": name, **self.nll(name).as_report("nll")} for name in self.conditions]
        answers = [
            {"condition": name, "where": where, "num_questions": self.answer("correct", name, where).change.num_samples}
            | {
                key: value
                for metric in ANSWER_METRICS
                for key, value in self.answer(metric, name, where).as_report(metric).items()
            }
            for where in WHERE
            for name in self.conditions
        ]
        return {
            "num_places": len(self.predicted),
            "num_questions": len(self.answered),
            "predictions": predictions,
            "answers": answers,
        }
