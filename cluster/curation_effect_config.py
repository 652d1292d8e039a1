"""Configuration of `curate effect`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import (
    SLOTS_PER_SUPER_BLOCK,
    BaseLMConfig,
    GistNetConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)
from cluster.evaluation_config import FocusEvaluationConfig, Positional, RetrievalConfig
from cluster.task_evaluation_config import TaskEvaluationConfig


def _words_and_keys() -> RetrievalConfig:
    return RetrievalConfig(fusion=["bm25", "dense"])


@dataclass(frozen=True)
class CurationEffectConfig:
    """Where, and by whose choices, two versions of a context are compared."""

    num_places: int = 64
    """Held positions: places of the context whose next tokens are predicted. At least 2."""

    horizon_tokens: int = 64
    """H: tokens behind each place whose NLL is measured."""

    history_tokens: int = 4096
    """Slots of history before each place and each question, a multiple of 1,024."""

    max_per_document: int = 8
    """Places in one document, at most. A document's places are one cluster for standard errors."""

    tasks: list[str] = field(default_factory=lambda: ["single_numbers", "recall_literal"])
    """What is planted and asked for, by the names of `evaluate tasks`: a needle, and a value by its key."""

    num_questions: int = 24
    """Samples of every task, each planted once in what both versions have in detail, and once in what the later one
    has not. At least 2."""

    budget: int = 512
    """W_max, in slots; a question's tokens count."""

    rivals: list[str] = field(default_factory=lambda: ["recency", "uniform", "bm25", "fusion"])
    """Who chooses what is shown: recency, uniform, random, bm25, dense, minilm, fusion, lensnet; in all of `forms`, or
    `chooser/form`. `fusion` is the default of sessions: words and routing keys by rank."""

    forms: list[str] = field(default_factory=lambda: ["overlay"])
    """In which forms a choice is shown: `overlay` and `strict` (gists stand in for what is not shown), `raw` (no
    gists)."""

    positional: Positional = "auto"
    """Position policy. `auto`: `global` where history and what follows fit the trained range, else `compact`."""

    tail_tokens: int = 128
    """Newest tokens that are shown raw, a multiple of 32. Places and questions stand where both versions have them."""

    max_blocks: int = 4
    """Blocks a rival may choose; what the budget has left goes to more of the tail."""

    retrieval: RetrievalConfig = field(default_factory=_words_and_keys)
    """How the rivals that search are asked."""

    lensnet: str = ""
    """Folder of the LensNet that rival `lensnet` asks."""

    seed: int = 0
    """Of places, questions and random choices."""

    num_workers: int = 0
    """Processes that measure, each with a model of its own. 0: one a CPU."""

    threads_per_worker: int = 1
    """torch threads of each."""

    def focus(self) -> FocusEvaluationConfig:
        """The part that predicts, as an evaluation of focus."""
        return FocusEvaluationConfig(
            num_places=self.num_places,
            history_tokens=self.history_tokens,
            horizon_tokens=self.horizon_tokens,
            max_per_document=self.max_per_document,
            places_per_history=1,
            oracle_blocks=self.max_blocks,
            **self._of_both(),
        )

    def questions(self) -> TaskEvaluationConfig:
        """The part that asks, as an evaluation on tasks."""
        return TaskEvaluationConfig(
            tasks=self.tasks,
            num_samples=self.num_questions,
            history_tokens=[self.history_tokens],
            generate=False,
            **self._of_both(),
        )

    def _of_both(self) -> dict[str, Any]:
        names = (
            "seed", "rivals", "forms", "positional", "tail_tokens", "max_blocks", "retrieval", "lensnet", "num_workers",
            "threads_per_worker",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"budgets": [self.budget]}

    def validate(self) -> None:
        require(self.num_questions >= 2, "evaluation.num_questions must be at least 2 (for an error bar)")
        require(
            self.history_tokens > 0 and self.history_tokens % SLOTS_PER_SUPER_BLOCK == 0,
            f"evaluation.history_tokens={self.history_tokens} must be a positive multiple of {SLOTS_PER_SUPER_BLOCK}",
        )
        self.focus().validate()
        self.questions().validate()


@dataclass(frozen=True)
class CurateEffectJob:
    """Measure what curation costs: NLL of held positions and recall of planted answers, before and after. Changes
    nothing. Costs minutes of the language model; no other job starts it."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model; must be the tree's."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The net that made the tree."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context; `store.version` is the version after, unless a plan is given."""
    plan: Path = Path()
    """A `plan.json` of `curate plan`: compare the version it was made of with what it would become, before anything is
    applied."""
    before: str = ""
    """Compare this version, a number or a tag, with `store.version`: what was applied. `curate apply` prints both."""
    evaluation: CurationEffectConfig = field(default_factory=CurationEffectConfig)
    """What is measured."""

    def validate(self) -> None:
        require(
            (self.plan != Path()) != bool(self.before),
            "give either plan (a plan.json: what it would cost) or before (a version: what it has cost), and not both",
        )
