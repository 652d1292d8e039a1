"""What two versions of a context are worth to the language model: the same horizons and questions in both.

The evaluators are those of `evaluate focus` and `evaluate tasks`, one a version. What both versions show alike is read
once, so a place that curation did not touch costs no more than one version does, and differs by exactly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from actors.compactor import Compactor, CompactorSpec
from actors.curation.effect_places import EffectQuestion, Sides
from actors.curation.plan import CurationPlan
from actors.evaluation.focus_evaluator import FocusEvaluator, FocusEvaluatorSpec, Known
from actors.evaluation.opened import open_searchable
from actors.evaluation.places import Place
from actors.evaluation.states import CuratedReader, states_of
from actors.evaluation.task_evaluator import TaskEvaluator
from actors.evaluation.task_scorer import Answers
from cluster.config import BaseLMConfig, StoreConfig
from cluster.curation_effect_config import CurationEffectConfig
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.lexical.search import LexicalSearcher
from storage.store import Store

Side = Literal["before", "after"]


@dataclass(frozen=True)
class SidesSpec:
    """Which two versions, the same in every worker."""

    store: StoreConfig
    before: int
    """Number of the version before."""
    after: int | CurationPlan
    """Number of the version after, or what it would be made by."""

    @contextmanager
    def opened(self) -> Iterator[Sides]:
        """Both, leased.

        Raises:
            StorageError: a version that is not kept any more.
            ConfigError: as `Sides.of`.
        """
        store = Store(self.store.root)
        with store.open_reader(self.store.context, seq=self.before) as before:
            if isinstance(self.after, CurationPlan):
                yield Sides.of(before, self.after)
                return
            with store.open_reader(self.store.context, seq=self.after) as after:
                yield Sides.of(before, after)

    def open_for_searching(self, tokenizer: Tokenizer) -> tuple[Sides, dict[Side, LexicalSearcher]]:
        """Both, for a worker, and its searchers."""
        before, words = open_searchable(self.store, self.before, tokenizer)
        after: int = self.before if isinstance(self.after, CurationPlan) else self.after
        second, second_words = open_searchable(self.store, after, tokenizer)
        sides = Sides.of(before, self.after if isinstance(self.after, CurationPlan) else second)
        return sides, {"before": words, "after": second_words}


@dataclass(frozen=True)
class Predicted:
    """One condition at one held position in one version."""

    side: Side
    condition: str
    slots: int
    nll: float
    """Mean over the horizon, nats a token."""
    picked: int
    """Blocks shown because they were chosen."""


@dataclass(frozen=True)
class Answered:
    """One condition at one question in one version."""

    side: Side
    condition: str
    slots: int
    feasible: bool
    correct: bool
    """The answer is the likeliest of the candidates."""
    answer_nll: float
    """Mean NLL of the answer's tokens, nats a token."""
    shown: float
    """Share of the needed blocks that are raw, whole."""
    num_candidates: int
    document: str
    """URI of the document the first needed block stands in."""


@dataclass(frozen=True)
class HeldPositionsSpec:
    """Everything a worker needs to predict horizons in both versions."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    sides: SidesSpec
    evaluation: CurationEffectConfig

    def build(self, gistnets: list[GistNet]) -> HeldPositions:
        """The evaluator, of the one net that made the tree."""
        sides, lexical = self.sides.open_for_searching(Tokenizer.load(self.base_lm))
        spec = FocusEvaluatorSpec(self.base_lm, self.sides.store, self.sides.before, self.evaluation.focus())
        lm = BaseLM.load(self.base_lm)
        return HeldPositions(
            {
                "before": FocusEvaluator(spec, lm, gistnets[0], sides.before, lexical["before"]),
                "after": FocusEvaluator(spec, lm, gistnets[0], sides.after, lexical["after"]),
            }
        )


class HeldPositions:
    """Predicts the same horizon in both versions. Plain class; `workers.EvaluatorActor` hosts it."""

    def __init__(self, evaluators: dict[Side, FocusEvaluator]) -> None:
        self._evaluators = evaluators

    def evaluate(self, place: Place) -> list[Predicted]:
        """Every condition at one place, in both versions."""
        known: Known = {}
        return [
            Predicted(side, m.condition, m.slots, m.nll, len(m.picked))
            for side, evaluator in self._evaluators.items()
            for m in evaluator.evaluate(place, known)
        ]


@dataclass(frozen=True)
class RecallSpec:
    """Everything a worker needs to plant answers and ask for them in both versions."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    compactor: CompactorSpec
    """Encodes what is planted as the tree was encoded."""
    sides: SidesSpec
    evaluation: CurationEffectConfig

    def build(self, gistnets: list[GistNet]) -> Recall:
        """The evaluator, of the one net that made the tree."""
        tokenizer = Tokenizer.load(self.base_lm)
        compactor = Compactor(self.compactor, gistnets[0])
        sides, lexical = self.sides.open_for_searching(tokenizer)
        shared = (self.evaluation.questions(), BaseLM.load(self.base_lm), gistnets[0], compactor, tokenizer)
        return Recall(
            sides,
            {
                "before": TaskEvaluator(*shared, sides.before, lexical["before"]),
                "after": TaskEvaluator(*shared, sides.after, lexical["after"]),
            },
        )


class Recall:
    """Asks the same question in both versions. Plain class; `workers.EvaluatorActor` hosts it.

    Needles are planted before, with their gists on every level. What the later version has pruned of them it shows as
    it shows everything pruned: by those gists.
    """

    def __init__(self, sides: Sides, evaluators: dict[Side, TaskEvaluator]) -> None:
        self._sides = sides
        self._evaluators = evaluators
        self._pools = {where: sides.super_blocks(where) for where in ("kept", "pruned")}
        self._states = states_of(sides.after, 0, sides.after.version.num_blocks)

    def evaluate(self, place: EffectQuestion) -> list[Answered]:
        """Every condition at one question, in both versions."""
        task_place = place.as_task_place()
        planter = self._evaluators["before"].planter
        asked = planter.question(task_place, self._pools[place.where])
        planted = planter.over(self._sides.after, asked.replaced)
        later = replace(asked, reader=CuratedReader(planted, self._states))
        document = self._sides.before.document_at(int(asked.needed[0])).meta.uri
        known: dict[tuple[str, bytes], Answers] = {}
        found = {
            "before": self._evaluators["before"].answer(asked, task_place, known),
            "after": self._evaluators["after"].answer(later, task_place, known),
        }
        return [
            Answered(
                side,
                m.condition,
                m.slots,
                # Of the version after, what is pruned can never be shown: that is what is measured.
                before.feasible,
                m.correct,
                m.answer_nll,
                float(np.round(m.recall, 4)),
                m.num_candidates,
                document,
            )
            for side in ("before", "after")
            for m, before in zip(found[side], found["before"], strict=True)
        ]
