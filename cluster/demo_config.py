"""Configuration of the demo; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import CompactJob, ReadBackConfig, require
from cluster.evaluation_config import FocusEvaluationConfig, RetrievalConfig


@dataclass(frozen=True)
class DemoFocusConfig:
    """Who chooses what a Working Context shows, compared at a few places: a look, not a measurement."""

    num_places: int = 12
    """Places of the corpus; 0: no comparison."""

    history_tokens: int = 2048
    """Slots of history before each, a multiple of 32."""

    budget: int = 256
    """W_max, in slots."""

    rivals: list[str] = field(
        default_factory=lambda: [
            "none", "full", "recency/raw", "recency/overlay", "bm25/overlay", "dense/overlay", "fusion/overlay",
        ]
    )  # fmt: skip
    """As `evaluation.rivals` of `evaluate focus`."""

    def validate(self) -> None:
        require(self.num_places >= 0, "focus.num_places must be 0 or more")
        if self.num_places:
            self.evaluation().validate()

    def evaluation(self) -> FocusEvaluationConfig:
        """As `evaluate focus` takes it: words and keys are fused, and half of the budget is raw tail."""
        return FocusEvaluationConfig(
            num_places=self.num_places,
            history_tokens=self.history_tokens,
            max_per_document=1,
            budgets=[self.budget],
            rivals=self.rivals,
            tail_tokens=self.budget // 64 * 32,
            retrieval=RetrievalConfig(fusion=["bm25", "dense"]),
        )


@dataclass(frozen=True)
class DemoJob(CompactJob):
    """Compact a real corpus, show the tree, let the real model read it back, and ask it something about it."""

    read_back: ReadBackConfig = field(default_factory=ReadBackConfig)
    """The reading back."""

    focus: DemoFocusConfig = field(default_factory=DemoFocusConfig)
    """The comparison of what Working Contexts show."""

    question: str = ""
    """Asked at the end of a session that remembers the corpus; its answer, and what was shown for it and why, are
    printed. What is said goes to the context `<store.context>-talk`. Empty: none."""
