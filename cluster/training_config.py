"""Configuration of `train gistnet`; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.config import (
    SLOTS_PER_SUPER_BLOCK,
    TOKENS_PER_BLOCK,
    BaseLMConfig,
    CorpusConfig,
    GistNetConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)


@dataclass(frozen=True)
class WindowsConfig:
    """How the corpus is cut for training."""

    window_tokens: int = SLOTS_PER_SUPER_BLOCK
    """Tokens of a window, a power of two from 64 to 8,192, and no more than the model was trained for. Gists are made
    of windows of 1,024; shorter ones are cheaper and teach less of what long left context does. From 2,048 on gists of
    LOD2 (1,024 tokens each) are trained, too; the attention of long windows makes a token dearer."""

    folder: Path = Path("data/windows")
    """Where tokenised windows are kept, 4 bytes a token, a folder for each corpus and tokenizer. Safe to delete. On a
    cluster of several machines a folder they all see."""

    num_validation: int = 64
    """Windows of the validation corpus that gists are measured on. More: smaller error bars, longer pauses."""

    def validate(self) -> None:
        allowed = [2**power for power in range(6, 14)]
        require(
            self.window_tokens in allowed,
            f"windows.window_tokens={self.window_tokens} must be one of {', '.join(map(str, allowed))}",
        )
        require(self.num_validation >= 2, "windows.num_validation must be at least 2: shuffled gists are another's")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student is asked for, and behind what."""

    max_tail_blocks: int = 4
    """Longest raw tail behind the gists, in blocks of 32 tokens; tails of all lengths up to it come up."""

    shown_share: float = 0.0
    """Of older blocks, those shown raw, as if they had been expanded, 0 to 1."""

    overlay: bool = True
    """Whether the gist of such a block stays beside it (overlay) or gives way (strict)."""

    restart_share: float = 0.0
    """Of windows, those in which a second Working Context begins somewhere, 0 to 1: behind gists that do not come from
    a window's first tokens, as in the middle of a document."""

    kl_share: float = 1.0
    """Weight of KL to the model that read everything raw, 0 to 1; the rest is that of the NLL of the text."""

    states_share: float = 0.0
    """Weight of matching the teacher's states after `states_layers` layers, 0 to 1; the rest is that of what is
    predicted. 1: nothing is predicted behind gists, and the student's pass ends after the highest of these layers."""

    states_layers: list[int] = field(default_factory=list)
    """After which of the model's layers states are matched."""

    scored_share: float = 1.0
    """Of the tokens behind gists, those that count, above 0 to 1: where the states of student and teacher lie farthest
    apart. Below 1 a step is quicker, and its losses are those of the tokens that gists do least for."""

    repeat_share: float = 0.0
    """Weight of saying a block again from its gist alone (autoencoding), 0 to 1; the rest is that of what is predicted
    behind gists. 1 asks for nothing else, and is quicker: a net to begin another run with, as its `gistnet.path`."""

    curriculum_share: float = 0.0
    """Over the first such share of a run the gists a token sees grow from the newest one to all of its window, 0 to 1.
    0: all from the beginning."""

    spread_floor: float = 0.0
    """Variance share of the gists, from 0 to below 1, under which the loss grows, by up to 1 nat: a net that says the
    same of everything looks good at first. 0: no such term."""

    inner_steps: int = 0
    """Steps that the gist vectors themselves take down the loss before the net is asked to put out where they come to.
    Each costs a reading behind gists and its backward pass. 0: the net goes down the loss itself."""

    inner_rate: float = 0.05
    """Length of such a step, as a share of the gist's own. With SmolLM2-135M 0.3 goes up the loss instead of down."""

    inner_share: float = 1.0
    """With `inner_steps`, weight of the distance to where they end, as a share of a gist's mean square, above 0 to 1;
    the rest is that of the loss behind the net's own gists, whose gradient is 19 or more times as long.
    1: that distance alone."""

    def validate(self) -> None:
        require(0 <= self.curriculum_share <= 1, "objective.curriculum_share must be from 0 to 1")
        require(0 <= self.spread_floor < 1, "objective.spread_floor must be from 0 to below 1")
        require(
            self.curriculum_share == 0 or self.repeat_share < 1,
            "objective.curriculum_share above 0 does nothing at objective.repeat_share=1; take one of them back",
        )
        require(0 <= self.repeat_share <= 1, "objective.repeat_share must be from 0 to 1")
        require(self.max_tail_blocks >= 1, "objective.max_tail_blocks must be at least 1")
        require(0 <= self.shown_share <= 1, "objective.shown_share must be from 0 to 1")
        require(0 <= self.restart_share <= 1, "objective.restart_share must be from 0 to 1")
        require(0 <= self.kl_share <= 1, "objective.kl_share must be from 0 to 1")
        require(0 <= self.states_share <= 1, "objective.states_share must be from 0 to 1")
        require(
            bool(self.states_layers) == (self.states_share > 0),
            "objective.states_share and objective.states_layers come together: how much, and after which layers",
        )
        require(
            self.states_share == 0 or self.repeat_share < 1,
            "objective.states_share above 0 does nothing at objective.repeat_share=1; take one of them back",
        )
        require(
            all(layer >= 1 for layer in self.states_layers),
            f"objective.states_layers={self.states_layers} must be 1 or more; 0 are the embeddings",
        )
        require(0 < self.scored_share <= 1, "objective.scored_share must be above 0, and at most 1")
        require(self.inner_steps >= 0, "objective.inner_steps must be 0 or more")
        require(self.inner_rate > 0, "objective.inner_rate must be positive")
        require(
            0 < self.inner_share <= 1,
            "objective.inner_share must be above 0, and at most 1; for no inner steps give objective.inner_steps=0",
        )
        require(
            self.scored_share == 1 or self.distils,
            "objective.scored_share below 1 compares predictions with a teacher's: give objective.kl_share above 0, "
            "repeat_share and states_share below 1",
        )

    @property
    def predicts(self) -> bool:
        """Whether anything is to be predicted behind gists."""
        return self.repeat_share < 1 and self.states_share < 1

    @property
    def distils(self) -> bool:
        """Whether a teacher's predictions are asked for."""
        return self.predicts and self.kl_share > 0

    @property
    def reads_own(self) -> bool:
        """Whether the loss behind the net's own gists is part of what is minimised."""
        return self.inner_steps == 0 or self.inner_share < 1


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA on the frozen language model: weights beside its own that adapt how it reads gists."""

    rank: int = 0
    """Of the two matrices beside each of the model's; they are trained together with the net. 0: none, the model reads
    as it is. The teacher, and what the net reads, are always those of the stock model."""

    alpha: int = 16
    """What the adapter adds is weighed by alpha / rank."""

    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Which linear maps of every layer get one. In Llama-like models there are q_proj, k_proj, v_proj, o_proj
    (attention), gate_proj, up_proj and down_proj."""

    seed: int = 0
    """Seed of the untrained adapter's weights."""

    def validate(self) -> None:
        require(self.rank >= 0, "adapter.rank must be 0 (no adapter) or more")
        require(self.alpha >= 1, "adapter.alpha must be at least 1")
        require(
            bool(self.target_modules) and len(set(self.target_modules)) == len(self.target_modules),
            f"adapter.target_modules={self.target_modules} must hold different names, at least one; adapter.rank=0 "
            "trains no adapter",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, workers, optimiser, checkpoints."""

    num_steps: int = 1000
    """Optimiser steps of the whole run. The learning rate falls to its end over them, so a run that is to go on longer
    is another run."""

    windows_per_step: int = 8
    """Windows of one optimiser step, over all workers and forward passes: a multiple of num_workers *
    windows_per_pass."""

    windows_per_pass: int = 1
    """Windows of one forward pass of one worker. More needs more memory and is faster on GPUs."""

    num_workers: int = 1
    """Ray Train workers. On CPUs the cores are shared out among them."""

    gpus_per_worker: float = 0.0
    """GPUs of a worker; 0 computes on the CPU."""

    threads_per_worker: int = 0
    """torch threads of a worker; 0 shares the cluster's CPUs out evenly. Losses are bit-identical only at equal thread
    counts."""

    learning_rate: float = 1e-3
    """Highest, of AdamW."""

    base_width: int = 256
    """Inputs of a linear layer up to which its weights learn at the full rate; those of one that is n times as wide
    learn at a part in n of it. 0: all at the full rate."""

    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0; then it falls along a cosine to a tenth."""

    weight_decay: float = 0.01
    """AdamW's, of matrices; gains, constants and biases have none."""

    beta2: float = 0.99
    """AdamW's; beta1 is 0.9."""

    clip_norm: float = 1.0
    """Longest gradient; longer ones are shortened to it."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what is sharded over the workers. 1: optimiser, 2: gradients too, 3: weights too. GistNets are
    small enough for 0."""

    seed: int = 0
    """Seed of the order of windows and of their cuts; that of the weights is gistnet.seed."""

    checkpoint_every_steps: int = 50
    """Steps between checkpoints. After a stop the steps since the last one are done again, with the same result."""

    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, besides the best by validation."""

    validate_every_steps: int = 100
    """Steps between measurements on the validation corpus; 0: only at the end."""

    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported net's file. bfloat16: half the size, weights rounded to 8 bits."""

    registered_name: str = "gistnet"
    """Name under which the net is entered in MLflow's model registry; empty: not."""

    max_failures: int = 3
    """Times a run goes on by itself after a worker or node was lost, before it gives up."""

    def validate(self) -> None:
        for name in ("num_steps", "windows_per_step", "windows_per_pass", "num_workers"):
            require(getattr(self, name) >= 1, f"training.{name} must be at least 1")
        for name in ("checkpoint_every_steps", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"training.{name} must be at least 1")
        not_negative = ("gpus_per_worker", "threads_per_worker", "base_width", "warmup_steps", "weight_decay")
        for name in (*not_negative, "validate_every_steps"):
            require(getattr(self, name) >= 0, f"training.{name} must be 0 or more")
        require(
            all(c.isalnum() or c in "-_." for c in self.registered_name),
            f"training.registered_name={self.registered_name!r} may hold letters, digits, '-', '_' and '.'",
        )
        require(self.learning_rate > 0, "training.learning_rate must be positive")
        require(self.clip_norm > 0, "training.clip_norm must be positive")
        require(0 <= self.beta2 < 1, "training.beta2 must be from 0 to below 1")
        require(self.max_failures >= 0, "training.max_failures must be 0 or more")
        at_once = self.num_workers * self.windows_per_pass
        require(
            self.windows_per_step % at_once == 0,
            f"training.windows_per_step={self.windows_per_step} must be a multiple of num_workers * windows_per_pass = "
            f"{self.num_workers} * {self.windows_per_pass}",
        )


@dataclass(frozen=True)
class TrainGistNetJob:
    """Train a GistNet by distillation from the frozen language model, on Ray Train and DeepSpeed."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where report, checkpoints and the trained net go."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text that is trained on; without paths the documents of the stored context. With `corpus.split=train` the
    `dev` split of the same text validates."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The store, and its context."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model."""
    gistnet: GistNetConfig = field(default_factory=lambda: GistNetConfig(path=""))
    """The net; with `path` a trained one that goes on."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA on the model that reads the gists; off by default."""
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    """How the text is cut."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, workers, optimiser, checkpoints."""

    def validate(self) -> None:
        window_blocks = self.windows.window_tokens // TOKENS_PER_BLOCK
        require(
            self.objective.max_tail_blocks < window_blocks,
            f"objective.max_tail_blocks={self.objective.max_tail_blocks} must be less than the {window_blocks} blocks "
            "of a window",
        )
        require(
            self.gistnet.kind in {"windowed", "block", "constant"},
            f"gistnet.kind={self.gistnet.kind} has nothing to train; take windowed, block or constant",
        )
        require(
            self.adapter.rank == 0 or self.objective.reads_own,
            "objective.inner_share=1 asks nothing of the model behind the net's own gists, so an adapter would learn "
            "nothing; lower it, or take adapter.rank=0",
        )
        require(
            self.adapter.rank == 0 or self.training.zero_stage < 3,
            "training.zero_stage=3 shards weights and gathers them where the trained net is called, but an adapter's "
            "stand within the frozen model, which is not sharded; take stage 0, 1 or 2, or adapter.rank=0",
        )
