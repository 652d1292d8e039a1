"""Configuration of the evaluation jobs; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config import (
    TOKENS_PER_BLOCK,
    BaseLMConfig,
    GistNetConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)

Policy = Literal["global", "compact", "anchored"]
Positional = Literal["auto", "global", "compact", "anchored"]
Searcher = Literal["bm25", "dense", "minilm"]


@dataclass(frozen=True)
class RetrievalConfig:
    """How the rivals that search are asked."""

    bm25_k1: float = 1.2
    """BM25: how much a term's second occurrence in a block adds."""

    bm25_b: float = 0.75
    """BM25: how much a long block's terms count less, 0 to 1."""

    bm25_query_tokens: int = 64
    """Newest tokens of the history whose words are looked up."""

    dense_query_tokens: int = 32
    """Newest tokens whose states are compared with the routing keys."""

    minilm_query_tokens: int = 64
    """Newest tokens whose sentence embedding is compared with the blocks'."""

    fusion: list[Searcher] = field(default_factory=lambda: ["bm25", "dense", "minilm"])
    """What is fused by reciprocal rank."""

    fusion_constant: float = 10.0
    """k of reciprocal rank fusion."""

    rerank_query_tokens: int = 32
    """Newest tokens whose likelihood, given a block, ranks the block."""

    def validate(self) -> None:
        require(self.bm25_k1 >= 0, "evaluation.retrieval.bm25_k1 must be 0 or more")
        require(0 <= self.bm25_b <= 1, "evaluation.retrieval.bm25_b must be from 0 to 1")
        for name in ("bm25_query_tokens", "dense_query_tokens", "minilm_query_tokens", "rerank_query_tokens"):
            require(1 <= getattr(self, name) <= 512, f"evaluation.retrieval.{name} must be from 1 to 512")
        require(bool(self.fusion), "evaluation.retrieval.fusion must name at least one searcher")
        require(self.fusion_constant >= 0, "evaluation.retrieval.fusion_constant must be 0 or more")


@dataclass(frozen=True)
class FocusEvaluationConfig:
    """Where and how rivals of focus are compared."""

    num_places: int = 400
    """Working Contexts: places of the corpus. At least 400 for a claim."""

    first_place: int = 0
    """Leave the places before this one to another run, on another machine or day; `evaluate headroom` reads both."""

    history_tokens: int = 4096
    """Slots of history before each place, a multiple of 32."""

    horizon_tokens: int = 64
    """H: tokens behind each place whose NLL is measured, in tokens."""

    within_document: bool = False
    """Take the history from the horizon's own document alone, instead of from the timeline."""

    max_per_document: int = 2
    """Histories that end in one document, at most. A document's places are one cluster for standard errors."""

    places_per_history: int = 4
    """Places that share a history's beginning, so that the full context is read once for all of them. The last one
    has the whole history, those before it 256 tokens less each."""

    seed: int = 0
    """Seed of the places and of random choices; the same seed gives the same numbers."""

    budgets: list[int] = field(default_factory=lambda: [512])
    """W_max of each comparison, in slots."""

    rivals: list[str] = field(
        default_factory=lambda: [
            "none", "full", "recency", "uniform", "random", "bm25", "dense", "minilm", "fusion", "rerank",
            "oracle_greedy", "oracle",
        ]
    )  # fmt: skip
    """Who is compared: a chooser, in all of `forms`; or `chooser/form`, `chooser/form@policy`: just that."""

    forms: list[str] = field(default_factory=lambda: ["raw", "overlay"])
    """In which forms a choice is shown: `raw` (no gists), `late` (the same, chosen blocks behind the raw tail),
    `late_ranked` (the best last), `late64` (before its newest 64 tokens; all with policy `compact`), `overlay`,
    `strict`, `constant` (an overlay whose gists all say the same)."""

    positional: Positional = "auto"
    """Position policy. `auto`: `global` where history and horizon fit the model's trained range, else `compact`."""

    tail_tokens: int = 128
    """Newest tokens every rival shows raw at least, a multiple of 32."""

    max_blocks: int = 4
    """Blocks a rival may choose; what the budget has left goes to more of the tail."""

    oracle_blocks: int = 8
    """Blocks an oracle may choose; it stops where none helps. It measures as many of every rival's first, where the
    shortlist holds them."""

    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """How the rivals that search are asked."""

    lensnet: str = ""
    """Folder of the LensNet that rival `lensnet` asks."""

    shortlist_blocks: int = 32
    """Blocks that `rerank` and the oracles measure: the rivals' picks and what they rank next."""

    oracle_readings: int = 2
    """Whole Working Contexts an oracle reads to choose, besides those of the rivals it starts from. More find more, and
    little: eight found 0.003 nats more than two at 122 places of 64k tokens, two 0.001 more than none at 400
    (docs/headroom.md)."""

    num_workers: int = 0
    """Processes that measure, each with a model of its own. 0: one a CPU."""

    threads_per_worker: int = 1
    """torch threads of each."""

    def validate(self) -> None:
        multiples = {"history_tokens": self.history_tokens, "tail_tokens": self.tail_tokens}
        for name, value in multiples.items():
            require(
                value >= TOKENS_PER_BLOCK and value % TOKENS_PER_BLOCK == 0,
                f"evaluation.{name}={value} must be a positive multiple of {TOKENS_PER_BLOCK}",
            )
        require(self.num_places >= 2, "evaluation.num_places must be at least 2 (for an error bar)")
        require(
            0 <= self.first_place <= self.num_places - 2,
            f"evaluation.first_place={self.first_place} must leave at least 2 of num_places={self.num_places}",
        )
        require(self.horizon_tokens >= 4, "evaluation.horizon_tokens must be at least 4 (two halves)")
        require(self.seed >= 0, f"evaluation.seed={self.seed} must be 0 or more")
        require(bool(self.budgets), "evaluation.budgets must hold at least one budget")
        for budget in self.budgets:
            require(
                budget > self.tail_tokens,
                f"evaluation.budgets holds {budget}, which the tail of {self.tail_tokens} tokens fills already",
            )
        require(self.places_per_history >= 1, "evaluation.places_per_history must be at least 1")
        spacing = max(256, -(-self.horizon_tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK)
        require(
            self.history_tokens - spacing * (self.places_per_history - 1) > self.tail_tokens,
            f"evaluation.history_tokens={self.history_tokens} leaves the first of {self.places_per_history} places "
            "that share it no more than the tail; lower evaluation.places_per_history",
        )
        require(self.max_per_document >= 1, "evaluation.max_per_document must be at least 1")
        choosers = {rival.partition("@")[0].partition("/")[0] for rival in self.rivals}
        lists = {"bm25", "dense", "minilm"} & (choosers | set(self.retrieval.fusion)) | {"fusion"}
        measured = {"oracle", "oracle_greedy", "rerank"} & choosers
        require(
            not measured or len(lists) * self.max_blocks <= self.shortlist_blocks,
            f"evaluation.shortlist_blocks={self.shortlist_blocks} cannot hold {self.max_blocks} picks of each of "
            f"{len(lists)} rivals; raise it or lower evaluation.max_blocks",
        )
        require(self.shortlist_blocks >= 1, "evaluation.shortlist_blocks must be at least 1")
        require(self.oracle_readings >= 0, f"evaluation.oracle_readings={self.oracle_readings} must be 0 or more")
        require(self.max_blocks >= 1, "evaluation.max_blocks must be at least 1")
        require(
            self.oracle_blocks >= self.max_blocks,
            f"evaluation.oracle_blocks={self.oracle_blocks} must be at least max_blocks={self.max_blocks}",
        )
        require(
            "lensnet" not in choosers or bool(self.lensnet),
            "rival 'lensnet' needs a net: give evaluation.lensnet the folder that `train lensnet` exported",
        )
        self.retrieval.validate()
        require(self.num_workers >= 0, "evaluation.num_workers must be 0 (one a CPU) or more")
        require(self.threads_per_worker >= 1, "evaluation.threads_per_worker must be at least 1")


@dataclass(frozen=True)
class EvaluateFocusJob:
    """Compare ways of choosing what a Working Context shows, at equal slots, on a stored context."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run's report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model; must be the tree's."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The net that made the tree."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context."""
    evaluation: FocusEvaluationConfig = field(default_factory=FocusEvaluationConfig)
    """What is compared, where."""
