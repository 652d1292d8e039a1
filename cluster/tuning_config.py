"""Configuration of `evaluate retrieval`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.config import BaseLMConfig, GistNetConfig, RunConfig, StoreConfig, TrackingConfig, require

Match = Literal["pooled", "max_sim"]

MAX_QUERY_TOKENS = 512
"""As of `RetrievalConfig`."""


@dataclass(frozen=True)
class RetrievalTuningConfig:
    """What was measured, and which settings of the searchers are tried on it."""

    samples: Path = Path("runs/evaluate-focus")
    """Samples of `evaluate focus` whose rivals hold `exhaustive`: a file, or the folder of a run with one."""

    budget: int = 0
    """Whose measured gains are used, in slots: one of the run's budgets. 0: the only one there is."""

    picks: int = 4
    """k of gain@k: a setting is worth what its first k blocks are."""

    bm25_k1: list[float] = field(default_factory=lambda: [0.6, 1.2, 2.0])
    """BM25's k1."""

    bm25_b: list[float] = field(default_factory=lambda: [0.0, 0.4, 0.75])
    """BM25's b."""

    bm25_query_tokens: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    """Newest tokens whose words are looked up. Empty: without `bm25`."""

    dense_query_tokens: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128])
    """Newest tokens whose states are compared with the routing keys. Empty: without `dense`."""

    dense_match: list[Match] = field(default_factory=lambda: ["pooled", "max_sim"])
    """What is compared: the states' mean, or the best of them. `evaluate focus` pools."""

    dense_own_metric: list[bool] = field(default_factory=lambda: [True, False])
    """Whether in the metric of the net that made the keys (whitened, or of trained keys plain cosine), as `evaluate
    focus` does, or merely centred."""

    minilm_query_tokens: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    """Newest tokens whose sentence embedding is compared with the blocks'. Empty: without `minilm`."""

    fusion_constants: list[float] = field(default_factory=lambda: [10.0, 60.0])
    """k of reciprocal rank fusion, for every two or more searchers at the best settings of each. Empty: without
    `fusion`."""

    threads: int = 1
    """torch threads. Beside other work one is best."""

    def validate(self) -> None:
        require(self.budget >= 0, f"tuning.budget={self.budget} must be 0 (the only one) or a budget of the samples")
        require(self.picks >= 1, "tuning.picks must be at least 1")
        queries = ("bm25_query_tokens", "dense_query_tokens", "minilm_query_tokens")
        require(
            any(getattr(self, name) for name in queries), f"one of {', '.join(queries)} of tuning must hold a number"
        )
        for name in queries:
            values = getattr(self, name)
            sound = all(1 <= value <= MAX_QUERY_TOKENS for value in values)
            require(sound, f"tuning.{name} holds {values}; all must be from 1 to {MAX_QUERY_TOKENS}")
        needed = {
            "bm25_k1": queries[0],
            "bm25_b": queries[0],
            "dense_match": queries[1],
            "dense_own_metric": queries[1],
        }
        for name, query in needed.items():
            require(
                bool(getattr(self, name)) or not getattr(self, query),
                f"tuning.{name} is empty; give it a value, or empty tuning.{query} too",
            )
        require(all(k1 >= 0 for k1 in self.bm25_k1), f"tuning.bm25_k1 holds {self.bm25_k1}; all must be 0 or more")
        require(all(0 <= b <= 1 for b in self.bm25_b), f"tuning.bm25_b holds {self.bm25_b}; all must be from 0 to 1")
        require(
            all(constant >= 0 for constant in self.fusion_constants),
            f"tuning.fusion_constants holds {self.fusion_constants}; all must be 0 or more",
        )
        require(self.threads >= 1, "tuning.threads must be at least 1")


@dataclass(frozen=True)
class EvaluateRetrievalJob:
    """Tune the searchers of focus on measured gains of all blocks: settings compared without the model reading on."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the report goes."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model; must be the tree's."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The net that made the tree."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The context the samples were measured on."""
    tuning: RetrievalTuningConfig = field(default_factory=RetrievalTuningConfig)
    """What is tuned, on which samples."""
