"""Configuration of `evaluate gist`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

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
from cluster.evaluation_config import Policy


@dataclass(frozen=True)
class GistEvaluationConfig:
    """Where and how gists are put in place of the history they were made of."""

    num_places: int = 400
    """Histories that are replaced. At least 400 for a claim."""

    history_tokens: int = 1024
    """Slots of history before each place, all of one document, a multiple of 32."""

    horizon_tokens: int = 64
    """H: tokens behind each place whose NLL is measured."""

    max_per_document: int = 4
    """Places in one document, at most. A document's places are one cluster for standard errors."""

    seed: int = 0
    """Seed of the places; the same seed gives the same numbers."""

    lods: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of detail that stand in for the history: 1, 2. With 2 every history begins at a super-block; blocks
    between the last whole super-block and the tail keep LOD1. For LOD2 alone `history_tokens` is a multiple of 1,024
    and the tail."""

    tail_tokens: list[int] = field(default_factory=lambda: [0, 64])
    """Newest tokens shown raw behind the gists, which then stand in for the others only; multiples of 32."""

    first_token: bool = False
    """Show the history's first token raw before the gists, as in the windows GistNets are trained in: models look away
    at a first token (an attention sink). It costs a slot, which recent raw tokens get, too."""

    gistnets: list[str] = field(default_factory=lambda: ["last_token", "mean", "rescaled_mean"])
    """Nets compared with the tree's own gists: folders of saved nets, or kinds (untrained ones and controls, of the
    sizes in section `gistnet`)."""

    positional: Policy = "global"
    """Position policy. `global` only where history and horizon fit the model's trained range."""

    num_workers: int = 0
    """Processes that measure, each with a model of its own. 0: one a CPU."""

    threads_per_worker: int = 1
    """torch threads of each."""

    def validate(self) -> None:
        require(self.num_places >= 2, "evaluation.num_places must be at least 2 (for an error bar)")
        require(self.horizon_tokens >= 2, "evaluation.horizon_tokens must be at least 2 (the first is not scored)")
        require(self.max_per_document >= 1, "evaluation.max_per_document must be at least 1")
        require(
            bool(self.lods) and set(self.lods) <= {1, 2} and len(set(self.lods)) == len(self.lods),
            f"evaluation.lods={self.lods} must hold 1, 2 or both",
        )
        unit = TOKENS_PER_BLOCK ** max(self.lods)
        require(
            self.history_tokens >= unit and self.history_tokens % TOKENS_PER_BLOCK == 0,
            f"evaluation.history_tokens={self.history_tokens} must be a multiple of {TOKENS_PER_BLOCK} and at least "
            f"{unit}, the slots of a node of LOD{max(self.lods)}; take another length or other evaluation.lods",
        )
        require(
            bool(self.tail_tokens) and len(set(self.tail_tokens)) == len(self.tail_tokens),
            f"evaluation.tail_tokens={self.tail_tokens} must hold different lengths, at least one (0: no tail)",
        )
        for tail in self.tail_tokens:
            require(
                0 <= tail < self.history_tokens and tail % TOKENS_PER_BLOCK == 0,
                f"evaluation.tail_tokens holds {tail}; it must be a multiple of {TOKENS_PER_BLOCK}, 0 or more and "
                f"less than the history of {self.history_tokens}",
            )
        require(
            len(set(self.gistnets)) == len(self.gistnets) and all(self.gistnets),
            f"evaluation.gistnets={self.gistnets} must hold different kinds or folders",
        )
        require(self.num_workers >= 0, "evaluation.num_workers must be 0 (one a CPU) or more")
        require(self.threads_per_worker >= 1, "evaluation.threads_per_worker must be at least 1")


@dataclass(frozen=True)
class EvaluateGistJob:
    """Measure what gists are worth in place of the history they were made of, beside their controls."""

    reads_with_adapter = True  # of the job, no key: `validate_sections` lets `base_lm.adapter` pass

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run's report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model; must be the tree's. With `adapter` it reads everything but raw histories (`full`)."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """Sizes and seed of the nets that are given by kind. The tree's own gists are read, so its net is not needed."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context."""
    evaluation: GistEvaluationConfig = field(default_factory=GistEvaluationConfig)
    """What is compared, where."""
