"""Configuration of `train keys`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.config import (
    TOKENS_PER_BLOCK,
    BaseLMConfig,
    CorpusConfig,
    GistNetConfig,
    RayConfig,
    RunConfig,
    TrackingConfig,
    require,
)


@dataclass(frozen=True)
class RoutingKeysConfig:
    """What routing keys are and what they are trained on."""

    dim: int = 128
    """Width of a key, at most the LM's. A tree's keys take 2 bytes a dimension and block."""

    layer: int = 0
    """Keys are made of the LM's states after so many layers, at most those the net reads; 0: of what the net reads."""

    reach: int = 8
    """Tokens right before a block that its key is made of, too, at most 32: so that the second block of a sentence
    about a thing is found by the thing's name."""

    dictionary: str = "package:wordnet"
    """WordNet's database files, where words and their descriptions come from: a folder, or a corpus of
    `corpus.corpora_file`."""

    num_facts: int = 16_000
    """Different things that facts are planted about; as many as are known, at most."""

    facts_per_window: int = 4
    """Facts planted in a window."""

    window_tokens: int = 512
    """Tokens of a window, 128 to 1,024."""

    windows_folder: Path = Path("data/windows")
    """Where tokenised windows are kept, 4 bytes a token, as `train gistnet` does."""

    windows_per_shard: int = 32
    """Windows that a step takes together: each question is compared with all of their blocks."""

    num_validation_windows: int = 256
    """Windows of the `dev` split whose blocks are searched; facts about things that are never trained on are planted
    in them."""

    num_epochs: int = 10
    """Passes over the shards."""

    learning_rate: float = 0.002
    """Highest, of AdamW."""

    temperature: float = 0.1
    """What cosines are divided by."""

    pairs_share: float = 0.3
    """Of the loss, the weight of pairs of blocks of the text itself that share rare words, 0 to 1; the rest is that of
    questions for planted facts, named and described alike."""

    hidden_share: float = 0.5
    """Of such pairs, those that ask without the words they share."""

    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported net's file. bfloat16: half the size, weights rounded to 8 bits, those of the gists too."""

    num_workers: int = 0
    """Processes that read with the language model. 0: one a CPU, of one thread each."""

    gpus_per_worker: float = 0.0
    """GPUs of such a process; 0 reads on the CPU."""

    registered_name: str = "gistnet"
    """Name under which the net is entered in MLflow's model registry; empty: not."""

    seed: int = 0
    """Of everything that is drawn."""

    def validate(self) -> None:
        for name in ("dim", "num_facts", "facts_per_window", "windows_per_shard", "num_epochs"):
            require(getattr(self, name) >= 1, f"routing_keys.{name} must be at least 1")
        for name in ("layer", "num_workers", "gpus_per_worker", "seed"):
            require(getattr(self, name) >= 0, f"routing_keys.{name} must be 0 or more")
        require(
            128 <= self.window_tokens <= 1024 and self.window_tokens & (self.window_tokens - 1) == 0,
            f"routing_keys.window_tokens={self.window_tokens} must be 128, 256, 512 or 1024",
        )
        require(
            self.facts_per_window <= self.window_tokens // (2 * TOKENS_PER_BLOCK),
            f"routing_keys.facts_per_window={self.facts_per_window} leaves too little text in a window of "
            f"{self.window_tokens} tokens; at most one in two blocks",
        )
        require(0 <= self.reach <= TOKENS_PER_BLOCK, f"routing_keys.reach={self.reach} must be 0 to {TOKENS_PER_BLOCK}")
        require(self.num_validation_windows >= 1, "routing_keys.num_validation_windows must be at least 1")
        require(self.learning_rate > 0, "routing_keys.learning_rate must be positive")
        require(self.temperature > 0, "routing_keys.temperature must be positive")
        for name in ("pairs_share", "hidden_share"):
            require(0 <= getattr(self, name) <= 1, f"routing_keys.{name} must be from 0 to 1")
        require(
            all(c.isalnum() or c in "-_." for c in self.registered_name),
            f"routing_keys.registered_name={self.registered_name!r} may hold letters, digits, '-', '_' and '.'",
        )

    @property
    def blocks_per_window(self) -> int:
        """Of 32 tokens."""
        return self.window_tokens // TOKENS_PER_BLOCK


@dataclass(frozen=True)
class TrainKeysJob:
    """Train the routing keys of a GistNet by contrast: of all blocks, a question's answer should be nearest."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where report and net go."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text that facts are planted in; its `train` split is trained on and its `dev` split validates."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model."""
    gistnet: GistNetConfig = field(default_factory=lambda: GistNetConfig(path=""))
    """The net whose keys are trained; its gists stay as they are."""
    routing_keys: RoutingKeysConfig = field(default_factory=RoutingKeysConfig)
    """The keys."""

    def validate(self) -> None:
        require(
            self.corpus.names_text and self.corpus.split == "train",
            "train keys needs a corpus to plant facts in, and holds back its dev split: give corpus.paths, and "
            "corpus.split=train",
        )
