"""Configuration of the job that labels edits; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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


@dataclass(frozen=True)
class LabelConfig:
    """Where edits are measured, and which."""

    tasks: list[str] = field(default_factory=list)
    """Plant these tasks of `evaluate tasks` in the context, and measure edits on the tokens of their answers. Empty:
    running text, and what came behind it."""

    num_places: int = 1000
    """Working Contexts. More may be asked for later: those there are stay. Of `tasks`, that many questions in all."""

    history_tokens: int = 4096
    """Slots of history before each place, a multiple of 32; of 1,024 with `tasks`."""

    horizon_tokens: int = 64
    """H: tokens behind each place whose NLL an edit changes."""

    max_per_document: int = 8
    """Histories that end in one document, at most."""

    budget: int = 512
    """W_max, in slots, with the edit and without."""

    tail_tokens: int = 128
    """Newest tokens that stay raw, a multiple of 32."""

    max_blocks: int = 8
    """Blocks shown by choice at most."""

    form: Literal["overlay", "strict", "raw"] = "overlay"
    """What stands for everything else: the gists of either mode, or nothing (`raw`)."""

    query_key_tokens: int = 32
    """Newest tokens that are compared with routing keys to find candidates."""

    num_random: int = 4
    """Candidates that chance adds to those that were found."""

    num_single: int = 16
    """Candidates that are shown alone. Each edit costs a reading of the whole Working Context."""

    num_sets: int = 1
    """Choices of several blocks at once."""

    num_collapsed: int = 2
    """Of each such choice, blocks that are given up again, one at a time."""

    num_swapped: int = 2
    """Of each, blocks that are given up for another."""

    seed: int = 0
    """Of places, chance and choices."""

    num_workers: int = 0
    """Processes that measure, each with a model of its own. 0: one a CPU."""

    threads_per_worker: int = 1
    """torch threads of each."""

    def validate(self) -> None:
        for name in ("history_tokens", "tail_tokens"):
            value = getattr(self, name)
            require(
                value >= TOKENS_PER_BLOCK and value % TOKENS_PER_BLOCK == 0,
                f"labels.{name}={value} must be a positive multiple of {TOKENS_PER_BLOCK}",
            )
        require(
            not self.tasks or self.history_tokens % SLOTS_PER_SUPER_BLOCK == 0,
            f"with labels.tasks, labels.history_tokens={self.history_tokens} must be a multiple of "
            f"{SLOTS_PER_SUPER_BLOCK}",
        )
        require(
            self.num_places >= max(2, len(self.tasks)),
            f"labels.num_places={self.num_places} must be at least 2, and one for each of labels.tasks",
        )
        require(self.horizon_tokens >= 4, "labels.horizon_tokens must be at least 4 (two halves)")
        require(self.max_per_document >= 1, "labels.max_per_document must be at least 1")
        require(self.max_blocks >= 2, "labels.max_blocks must be at least 2")
        require(
            self.budget >= self.tail_tokens + TOKENS_PER_BLOCK,
            f"labels.budget={self.budget} leaves no room for a block beside a tail of {self.tail_tokens} tokens",
        )
        require(1 <= self.query_key_tokens <= 128, "labels.query_key_tokens must be from 1 to 128")
        for name in ("num_random", "num_sets", "num_collapsed", "num_swapped", "seed", "num_workers"):
            require(getattr(self, name) >= 0, f"labels.{name} must be 0 or more")
        require(self.num_single >= 1, "labels.num_single must be at least 1")
        require(self.threads_per_worker >= 1, "labels.threads_per_worker must be at least 1")


@dataclass(frozen=True)
class LabelJob:
    """Measure what edits of Working Contexts are worth: the labels that LensNet is trained on."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the labels go."""
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
    labels: LabelConfig = field(default_factory=LabelConfig)
    """What is measured, where."""
