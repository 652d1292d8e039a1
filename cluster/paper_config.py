"""Configuration of `paper 0`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import (
    BaseLMConfig,
    CorpusSplit,
    GistNetConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)
from cluster.session_config import SessionConfig


@dataclass(frozen=True)
class PaperConfig:
    """What the paper is made of; every stage is a run of its own, `<run.name>-<stage>`."""

    texts: list[str] = field(default_factory=lambda: ["code=package:code", "prose=package:prose"])
    """`kind=path` of each kind of text that is measured; paths as of `corpus.paths`."""

    label_split: CorpusSplit = "dev"
    """Documents on which edits are labelled, and LensNet is trained."""

    evaluation_split: CorpusSplit = "held_out"
    """Documents on which everything is measured; none of those above, but with `all`."""

    gistnet_recipe: str = ""
    """Recipe of `train gistnet`: train the GistNet first. Empty: take `gistnet.path`."""

    lensnet: str = ""
    """Folder of a LensNet. Empty: edits are labelled and one is trained."""

    label_places: int = 250
    """Working Contexts of each kind of text whose edits are labelled."""

    num_places: int = 200
    """Places of each kind of text at which gists, and focus, are measured. At least 400 in all for a claim."""

    gist_cases: list[str] = field(default_factory=lambda: ["practical", "gists-only"])
    """Ways to use gists that are measured: names of docs/fidelity.md."""

    history_tokens: int = 4096
    """Slots of history before each place, for labels and focus."""

    budget: int = 512
    """W_max, for labels and focus."""

    rivals: list[str] = field(
        default_factory=lambda: [
            "full", "recency/raw", "bm25/raw", "dense/raw", "fusion/raw", "lensnet/raw", "oracle/raw",
            "recency/overlay", "fusion/overlay", "lensnet/overlay", "oracle/overlay",
        ]
    )  # fmt: skip
    """Who is compared, as `evaluation.rivals` of `evaluate focus`."""

    latency_tokens: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 7936])
    """Lengths at which a session is compared with the model that keeps everything, ascending. Empty: it is not."""

    latency_repeats: int = 3
    """Of each."""

    seed: int = 0
    """Of places, labels and the LensNet."""

    def validate(self) -> None:
        require(bool(self.texts), "paper.texts must name at least one kind of text, as in code=package:code")
        for text in self.texts:
            kind, equals, path = text.partition("=")
            require(bool(kind and equals and path), f"paper.texts holds {text!r}; write kind=path")
        kinds = self.kinds
        require(len(set(kinds)) == len(kinds), f"paper.texts names a kind twice: {', '.join(kinds)}")
        require(
            self.label_split == "all" or self.label_split != self.evaluation_split,
            f"paper.label_split and evaluation_split are both {self.label_split}: LensNet would be measured on what it "
            "was trained on",
        )
        for name in ("label_places", "num_places"):
            require(getattr(self, name) >= 2, f"paper.{name} must be at least 2")
        require(self.latency_repeats >= 1, "paper.latency_repeats must be at least 1")
        require(
            self.latency_tokens == sorted(set(self.latency_tokens)) and all(n > 0 for n in self.latency_tokens),
            f"paper.latency_tokens={self.latency_tokens} must be positive and ascending",
        )
        require(self.seed >= 0, "paper.seed must be 0 or more")

    @property
    def kinds(self) -> list[str]:
        """Kinds of text."""
        return [text.partition("=")[0] for text in self.texts]


@dataclass(frozen=True)
class PaperJob:
    """Measure everything anew, from compaction to latency, and write the tables and figures of a paper."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the paper goes; the stages' runs stand beside it."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model."""
    gistnet: GistNetConfig = field(default_factory=lambda: GistNetConfig(path="models/packaged/gistnet-smollm2-135m"))
    """Who compresses; not looked at with `paper.gistnet_recipe`."""
    store: StoreConfig = field(default_factory=lambda: StoreConfig(context="paper"))
    """The store; contexts are `<store.context>-<kind>` and `<store.context>-<kind>-labels`."""
    session: SessionConfig = field(default_factory=SessionConfig)
    """The Working Context of the sessions whose latency is measured."""
    paper: PaperConfig = field(default_factory=PaperConfig)
    """What is measured."""
