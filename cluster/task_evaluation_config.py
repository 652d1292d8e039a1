"""Configuration of `evaluate tasks`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import (
    SLOTS_PER_SUPER_BLOCK,
    TOKENS_PER_BLOCK,
    BaseLMConfig,
    GistNetConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)
from cluster.evaluation_config import Positional, RetrievalConfig


@dataclass(frozen=True)
class TaskEvaluationConfig:
    """Which tasks are asked of which histories, and who chooses what is shown."""

    tasks: list[str] = field(
        default_factory=lambda: [
            "single_numbers", "multi_key_words", "multi_value_numbers", "multi_query_words", "variable_tracking",
            "common_words", "one_fact", "two_facts", "three_facts", "recall_literal", "recall_paraphrased",
            "ask_again",
        ]
    )  # fmt: skip
    """Tasks by name; an unknown one is refused with those there are."""

    num_samples: int = 50
    """Samples of every task at every length and depth. Ten in a row visit every tenth of the history once."""

    history_tokens: list[int] = field(default_factory=lambda: [4096, 65536])
    """Lengths of the history in slots, multiples of 1,024. 0: all full super-blocks of the context."""

    depth_percents: list[int] = field(default_factory=list)
    """Depths of what is needed, 0 (oldest) to 100: every sample is asked at each of them. Empty: where the task puts
    it."""

    seed: int = 0
    """Seed of samples, places and random choices; the same seed gives the same numbers."""

    budgets: list[int] = field(default_factory=lambda: [512])
    """W_max of each comparison, in slots, the question's tokens included."""

    rivals: list[str] = field(
        default_factory=lambda: [
            "none", "full", "needles", "recency", "uniform", "random", "bm25", "dense", "minilm", "fusion", "oracle",
        ]
    )  # fmt: skip
    """Who is compared. `needles`: only what the answer depends on and the tail, the model's own ceiling. `full`: where
    it fits the model."""

    forms: list[str] = field(default_factory=lambda: ["raw", "overlay"])
    """In which forms a choice is shown: `raw` (no gists), `late` (the same, chosen blocks behind the raw tail),
    `late_ranked` (the best last), `late64` (before its newest 64 tokens; all with policy `compact`), `overlay`,
    `strict`."""

    positional: Positional = "auto"
    """Position policy. `auto`: `global` where history and question fit the model's trained range, else `compact`."""

    tail_tokens: int = 128
    """Newest tokens of the history every rival shows raw, a multiple of 32."""

    max_blocks: int = 8
    """Blocks a rival may choose; what the budget has left goes to more of the tail."""

    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """How the rivals that search are asked; the question is the whole query."""

    lensnet: str = ""
    """Folder of the LensNet that rival `lensnet` asks."""

    shortlist_blocks: int = 32
    """Blocks the oracle measures: those that are needed, then the rivals' picks."""

    oracle_pool: int = 12
    """Blocks of the shortlist the oracle goes on with after measuring each alone."""

    generate: bool = True
    """Also answer in free text (greedy), for exact match; otherwise only candidates are compared."""

    num_workers: int = 0
    """Processes that measure, each with a model of its own. 0: one a CPU."""

    threads_per_worker: int = 1
    """torch threads of each."""

    def validate(self) -> None:
        require(bool(self.tasks), "evaluation.tasks must name at least one task")
        require(self.num_samples >= 2, "evaluation.num_samples must be at least 2 (for an error bar)")
        require(bool(self.history_tokens), "evaluation.history_tokens must hold at least one length")
        for length in self.history_tokens:
            require(
                length >= 0 and length % SLOTS_PER_SUPER_BLOCK == 0,
                f"evaluation.history_tokens holds {length}, which is no multiple of {SLOTS_PER_SUPER_BLOCK} (0: all)",
            )
        for depth in self.depth_percents:
            require(0 <= depth <= 100, f"evaluation.depth_percents holds {depth}; depths are from 0 to 100")
        require(
            self.tail_tokens >= TOKENS_PER_BLOCK and self.tail_tokens % TOKENS_PER_BLOCK == 0,
            f"evaluation.tail_tokens={self.tail_tokens} must be a positive multiple of {TOKENS_PER_BLOCK}",
        )
        require(
            bool(self.lensnet) or not any(name.partition("/")[0] == "lensnet" for name in self.rivals),
            "rival 'lensnet' needs a net: give evaluation.lensnet the folder that `train lensnet` exported",
        )
        require(bool(self.budgets), "evaluation.budgets must hold at least one budget")
        self.retrieval.validate()
        for name in ("max_blocks", "shortlist_blocks", "oracle_pool", "threads_per_worker"):
            require(getattr(self, name) >= 1, f"evaluation.{name} must be at least 1")
        require(self.num_workers >= 0, "evaluation.num_workers must be 0 (one a CPU) or more")


@dataclass(frozen=True)
class EvaluateTasksJob:
    """Plant answers in a stored context, ask for them, and compare who shows the model what it needs."""

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
    """Which store and context; nothing is written to the tree."""
    evaluation: TaskEvaluationConfig = field(default_factory=TaskEvaluationConfig)
    """What is asked, where, and of whom."""
