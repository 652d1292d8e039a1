"""The training of a key head over stored states, and how well keys find what was planted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.optim import AdamW

from actors.training.key_examples import KINDS
from actors.training.key_states import load_shard
from cluster.heap import keep_freed_memory
from cluster.key_training_config import RoutingKeysConfig
from cluster.ray_calls import check_resources
from models.gistnet import GistNet
from models.training.key_contrast import begin, block_keys, contrast, question_keys, ranks

PAIRS = "shared words"
"""Beside `KINDS`: pairs of blocks of the text itself."""

WARM_UP_STEPS = 20
FINAL_SHARE = 0.05
"""Of the learning rate, what is left at the end."""


@dataclass(frozen=True)
class KeyTrainerSpec:
    """What is trained on what."""

    keys: RoutingKeysConfig
    blocks_per_window: int
    shards: tuple[Path, ...]
    validation: tuple[Path, ...]
    num_threads: int


class KeyTrainer:
    """A head's optimiser and its data; in a process whose torch threads are its own."""

    def __init__(self, spec: KeyTrainerSpec, net: GistNet) -> None:
        torch.set_num_threads(spec.num_threads)
        keep_freed_memory()
        self.spec = spec
        self.net = net
        groups = begin(net)
        self._shares = [group.pop("share") for group in groups]
        self._optimiser = AdamW(groups, spec.keys.learning_rate)
        self._num_steps = len(spec.shards) * spec.keys.num_epochs
        self._step = 0

    def epoch(self) -> list[dict[str, float]]:
        """One pass over the shards in an order of its own: the losses of each step, nats."""
        order = np.random.default_rng((self.spec.keys.seed, self._step)).permutation(len(self.spec.shards))
        return [self._train(load_shard(self.spec.shards[shard])) for shard in order]

    def _train(self, shard: dict[str, Tensor]) -> dict[str, float]:
        keys = self.spec.keys
        rate = keys.learning_rate * self._rate_share()
        for group, share in zip(self._optimiser.param_groups, self._shares, strict=True):
            group["lr"] = share * rate
        blocks = block_keys(self.net, shard["blocks"])
        asked = question_keys(self.net, shard["questions"], shard["mask"])
        nll = contrast(asked, blocks, shard["answers"], _other_parts(shard), keys.temperature)
        losses = {name: nll[shard["kinds"] == kind].mean() for kind, name in enumerate(KINDS)}
        if keys.pairs_share > 0 and len(shard["pairs"]):
            losses[PAIRS] = self._pairs_nll(shard, blocks, hidden_share=keys.hidden_share).mean()
        weights = {PAIRS: keys.pairs_share}
        loss = torch.stack([weights.get(n, (1 - keys.pairs_share) / len(KINDS)) * v for n, v in losses.items()]).sum()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self._step += 1
        return {"step": self._step, "loss": float(loss.detach()), **{n: float(v.detach()) for n, v in losses.items()}}

    def _pairs_nll(self, shard: dict[str, Tensor], blocks: Tensor, hidden_share: float) -> Tensor:
        asked, answers, excluded = self._pair_keys(shard, hidden_share)
        return contrast(asked, blocks, answers, excluded, self.spec.keys.temperature)

    def _pair_keys(self, shard: dict[str, Tensor], hidden_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of the later blocks as questions, a part of them without the tokens they share; their answers; and what
        is no choice: the block itself, the one before, and those of its window that come after."""
        later, earlier = shard["pairs"].unbind(dim=1)
        generator = torch.Generator().manual_seed(self._step)
        hides = torch.rand(len(later), 1, generator=generator) < hidden_share
        own = shard["pair_own"]
        mask = torch.where(hides & own.any(dim=1, keepdim=True), own, torch.ones_like(own))
        asked = question_keys(self.net, shard["blocks"][later], mask)
        numbers = torch.arange(len(shard["blocks"]))[None]
        per_window = self.spec.blocks_per_window
        same_window = numbers // per_window == later[:, None] // per_window
        return asked, earlier, same_window & (numbers >= later[:, None] - 1)

    def _rate_share(self) -> float:
        if self._step < WARM_UP_STEPS:
            return (self._step + 1) / (WARM_UP_STEPS + 1)
        done = (self._step - WARM_UP_STEPS) / max(self._num_steps - WARM_UP_STEPS, 1)
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def trained(self) -> GistNet:
        """The net as it is now."""
        return self.net

    @torch.no_grad()
    def validate(self) -> dict[str, list[int]]:
        """Ranks of the answers among the blocks of all validation shards, by kind of question."""
        return validation_ranks(self.spec.validation, self.spec.blocks_per_window, self)

    def keys_of(self, shard: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of a shard's blocks and questions."""
        return block_keys(self.net, shard["blocks"]), question_keys(self.net, shard["questions"], shard["mask"])

    def pair_questions(self, shard: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a shard's pairs, half of them without what they share."""
        return self._pair_keys(shard, 0.5)


def validation_ranks(paths: Sequence[Path], blocks_per_window: int, embedder: Any) -> dict[str, list[int]]:
    """Ranks of answers, 0 the first, by kind of question; pairs where the embedder knows how to ask with them.

    Args:
        paths: shards that are searched as one history.
        blocks_per_window: of their windows.
        embedder: has `keys_of(shard)`, keys of blocks and questions, and perhaps `pair_questions(shard)`.
    """
    shards = [load_shard(path) for path in paths]
    firsts = np.cumsum([0, *(len(shard["blocks"]) for shard in shards)])
    embedded = [embedder.keys_of(shard) for shard in shards]
    blocks = torch.cat([keys for keys, _ in embedded])
    found: dict[str, list[int]] = {name: [] for name in KINDS}
    spans = torch.cat([shard["spans"] + int(first) for shard, first in zip(shards, firsts, strict=False)])
    words = torch.cat([shard["words"] for shard in shards])
    for shard, first, (_, asked) in zip(shards, firsts, embedded, strict=False):
        answers = shard["answers"] + int(first)
        excluded = torch.zeros(len(asked), len(blocks), dtype=torch.bool)
        for row, word in enumerate(shard["words"].tolist()):
            # The same thing's other facts answer as well.
            for low, high in spans[words == word].tolist():
                excluded[row, low : high + 1] = True
        excluded.scatter_(1, answers[:, None], False)
        placed = ranks(asked, blocks, answers, excluded)
        for kind, name in enumerate(KINDS):
            found[name] += placed[shard["kinds"] == kind].tolist()
    if hasattr(embedder, "pair_questions"):
        found[PAIRS] = []
        for shard, first in zip(shards, firsts, strict=False):
            if len(shard["pairs"]) == 0:
                continue
            asked, answers, own = embedder.pair_questions(shard)
            excluded = torch.zeros(len(asked), len(blocks), dtype=torch.bool)
            excluded[:, int(first) : int(first) + own.shape[1]] = own
            found[PAIRS] += ranks(asked, blocks, answers + int(first), excluded).tolist()
    return found


def _other_parts(shard: dict[str, Tensor]) -> Tensor:
    """Blocks that hold another part of a question's fact."""
    numbers = torch.arange(len(shard["blocks"]))[None]
    first, last = shard["spans"][:, :1], shard["spans"][:, 1:]
    return (numbers >= first) & (numbers <= last) & (numbers != shard["answers"][:, None])


def start_trainer(spec: KeyTrainerSpec, net: GistNet) -> Any:
    """A `KeyTrainer` in an actor of its own.

    Raises:
        ResourceError: the cluster cannot hold it.
    """
    request = {"CPU": float(spec.num_threads)}
    check_resources([request], "training routing keys")
    remote: Any = ray.remote(KeyTrainer)
    return remote.options(num_cpus=spec.num_threads).remote(spec, net)
