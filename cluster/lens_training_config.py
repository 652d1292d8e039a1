"""Configuration of the job that trains LensNet; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import RayConfig, RunConfig, TrackingConfig, require


@dataclass(frozen=True)
class LensNetConfig:
    """The net, and how it is trained."""

    labels: list[str] = field(default_factory=list)
    """Files of `ray_job.py label` that are trained on, or the folders of their runs."""

    validation: list[str] = field(default_factory=list)
    """Those it is measured on: of other documents. Empty: a fifth of the documents of `labels` are held back."""

    leave_out: list[str] = field(default_factory=list)
    """Features it is not told (an ablation), by name."""

    num_folds: int = 0
    """Train so many nets besides, each without a part of the documents, and report what they do there: every document
    is measured by a net that has not seen it. 0: none."""

    ablate: bool = False
    """With `num_folds`: train all of them anew without each feature, the keys, and attention, and say what it costs."""

    key_directions: int = 16
    """Learned directions of the routing keys it sees beside the features; 0: none."""

    hidden_dim: int = 64
    """Width."""

    num_layers: int = 2
    """Of attention among candidates; 0 scores each by itself."""

    num_heads: int = 4
    """Of attention."""

    dropout: float = 0.1
    """While it is trained."""

    max_score: float = 0.5
    """Bound of a score, nats a token."""

    num_epochs: int = 8
    """Passes over the labels. More than a few learn hundreds of Working Contexts by heart: watch `num_folds`."""

    contexts_per_step: int = 32
    """Working Contexts of an optimiser step."""

    learning_rate: float = 0.001
    """Highest, of AdamW."""

    weight_decay: float = 0.05
    """Of matrices."""

    regression_weight: float = 1.0
    """Of what each edit is worth, in the loss."""

    preference_weight: float = 1.0
    """Of which of two blocks is worth more (Bradley-Terry)."""

    balance_weight: float = 0.1
    """Of scores that are right on average in every Working Context."""

    temperature: float = 0.05
    """Of preferences, nats a token."""

    seed: int = 0
    """Of weights, order and held-back documents."""

    def validate(self) -> None:
        for name in ("hidden_dim", "num_heads", "num_epochs", "contexts_per_step"):
            require(getattr(self, name) >= 1, f"lensnet.{name} must be at least 1")
        for name in ("key_directions", "num_layers", "seed"):
            require(getattr(self, name) >= 0, f"lensnet.{name} must be 0 or more")
        require(
            self.hidden_dim % self.num_heads == 0,
            f"lensnet.hidden_dim={self.hidden_dim} must be a multiple of num_heads={self.num_heads}",
        )
        require(self.num_folds >= 0 and self.num_folds != 1, "lensnet.num_folds must be 0, or 2 or more")
        require(not self.ablate or self.num_folds > 1, "lensnet.ablate needs lensnet.num_folds, 5 for example")
        require(0 <= self.dropout < 1, "lensnet.dropout must be from 0 to below 1")
        for name in ("max_score", "learning_rate", "temperature"):
            require(getattr(self, name) > 0, f"lensnet.{name} must be positive")
        for name in ("weight_decay", "regression_weight", "preference_weight", "balance_weight"):
            require(getattr(self, name) >= 0, f"lensnet.{name} must be 0 or more")
        require(
            self.regression_weight + self.preference_weight > 0,
            "lensnet.regression_weight and preference_weight are both 0: nothing is learned",
        )


@dataclass(frozen=True)
class TrainLensNetJob:
    """Train LensNet on measured edits: which blocks a Working Context should show."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where report and net go."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    lensnet: LensNetConfig = field(default_factory=LensNetConfig)
    """The net."""
