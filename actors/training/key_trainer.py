"""The training of a key head over stored states, and how well keys find what was planted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import torch
from jaxtyping import Bool, Float32, Int64
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


Shard = dict[str, Tensor]
"""What `load_shard` gives."""


@dataclass(frozen=True)
class Placed:
    """Where answers were found."""

    ranks: list[int]
    """How many blocks stood before each: 0 where it was found first."""
    things: list[str]
    """What each question is about: answers about one thing are not independent of each other."""

    def add(self, placed: Tensor, things: Sequence[str]) -> None:
        """Some more."""
        self.ranks.extend(placed.tolist())
        self.things.extend(things)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a shard's blocks, as questions: P of them among N blocks."""

    asking: Int64[Tensor, " P"]
    answers: Int64[Tensor, " P"]
    mask: Bool[Tensor, "P 32"]
    """Tokens that ask: all of the later block's, or those that the earlier one does not have."""
    excluded: Bool[Tensor, "P N"]
    """What is no choice: the block itself, the one before, and those of its window that come after."""


class Embedder(Protocol):
    """What blocks and questions are compared by."""

    def keys_of(self, shard: Shard) -> tuple[Float32[Tensor, "N d"], Float32[Tensor, "Q d"]]:
        """Of a shard's blocks and questions, of length 1."""
        ...

    def keys_of_pairs(self, shard: Shard, pairs: Pairs) -> Float32[Tensor, "P d"]:
        """Of blocks that ask."""
        ...


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

    def _train(self, shard: Shard) -> dict[str, float]:
        keys = self.spec.keys
        rate = keys.learning_rate * self._rate_share()
        for group, share in zip(self._optimiser.param_groups, self._shares, strict=True):
            group["lr"] = share * rate
        blocks = block_keys(self.net, shard["blocks"])
        asked = question_keys(self.net, shard["questions"], shard["mask"])
        nll = contrast(asked, blocks, shard["answers"], _other_parts(shard), keys.temperature)
        losses = {name: nll[shard["kinds"] == kind].mean() for kind, name in enumerate(KINDS)}
        if keys.pairs_share > 0 and len(shard["pairs"]):
            pairs = _pairs(shard, self.spec.blocks_per_window, keys.hidden_share, seed=self._step)
            asked = self.keys_of_pairs(shard, pairs)
            losses[PAIRS] = contrast(asked, blocks, pairs.answers, pairs.excluded, keys.temperature).mean()
        weights = {PAIRS: keys.pairs_share}
        loss = torch.stack([weights.get(n, (1 - keys.pairs_share) / len(KINDS)) * v for n, v in losses.items()]).sum()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self._step += 1
        return {"step": self._step, "loss": float(loss.detach()), **{n: float(v.detach()) for n, v in losses.items()}}

    def _rate_share(self) -> float:
        if self._step < WARM_UP_STEPS:
            return (self._step + 1) / (WARM_UP_STEPS + 1)
        done = (self._step - WARM_UP_STEPS) / max(self._num_steps - WARM_UP_STEPS, 1)
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def trained(self) -> GistNet:
        """The net as it is now."""
        return self.net

    @torch.no_grad()
    def validate(self) -> dict[str, Placed]:
        """Where the answers stand among the blocks of all validation shards, by kind of question."""
        return find_answers(self.spec.validation, self.spec.blocks_per_window, self)

    def keys_of(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """See `Embedder`."""
        return block_keys(self.net, shard["blocks"]), question_keys(self.net, shard["questions"], shard["mask"])

    def keys_of_pairs(self, shard: Shard, pairs: Pairs) -> Tensor:
        """See `Embedder`."""
        return question_keys(self.net, shard["blocks"][pairs.asking], pairs.mask)


def find_answers(paths: Sequence[Path], blocks_per_window: int, embedder: Embedder) -> dict[str, Placed]:
    """Search shards as one history: where the answers stand, by kind of question.

    Args:
        paths: of the shards.
        blocks_per_window: of their windows.
        embedder: makes what is compared.
    """
    shards = [load_shard(path) for path in paths]
    firsts = np.cumsum([0, *(len(shard["blocks"]) for shard in shards)]).tolist()[:-1]
    embedded = [embedder.keys_of(shard) for shard in shards]
    blocks = torch.cat([keys for keys, _ in embedded])
    spans = torch.cat([shard["spans"] + first for shard, first in zip(shards, firsts, strict=True)])
    words = torch.cat([shard["words"] for shard in shards])
    found: dict[str, Placed] = {name: Placed([], []) for name in (*KINDS, PAIRS)}
    for number, (shard, first, (_, asked)) in enumerate(zip(shards, firsts, embedded, strict=True)):
        answers = shard["answers"] + first
        excluded = torch.zeros(len(asked), len(blocks), dtype=torch.bool)
        for row, word in enumerate(shard["words"].tolist()):
            # The same thing's other facts answer as well.
            for low, high in spans[words == word].tolist():
                excluded[row, low : high + 1] = True
        excluded.scatter_(1, answers[:, None], False)
        placed = ranks(asked, blocks, answers, excluded)
        for kind, name in enumerate(KINDS):
            own = shard["kinds"] == kind
            found[name].add(placed[own], [str(word) for word in shard["words"][own].tolist()])
        if len(shard["pairs"]):
            pairs = _pairs(shard, blocks_per_window, hidden_share=0.5, seed=0)
            excluded = torch.zeros(len(pairs.asking), len(blocks), dtype=torch.bool)
            excluded[:, first : first + pairs.excluded.shape[1]] = pairs.excluded
            placed = ranks(embedder.keys_of_pairs(shard, pairs), blocks, pairs.answers + first, excluded)
            found[PAIRS].add(placed, [f"{number}/{block // blocks_per_window}" for block in pairs.asking.tolist()])
    return found


def _pairs(shard: Shard, blocks_per_window: int, hidden_share: float, seed: int) -> Pairs:
    asking, answers = shard["pairs"].unbind(dim=1)
    hides = torch.rand(len(asking), 1, generator=torch.Generator().manual_seed(seed)) < hidden_share
    own = shard["pair_own"]
    mask = torch.where(hides & own.any(dim=1, keepdim=True), own, torch.ones_like(own))
    numbers = torch.arange(len(shard["blocks"]))[None]
    same_window = numbers // blocks_per_window == asking[:, None] // blocks_per_window
    return Pairs(asking, answers, mask, same_window & (numbers >= asking[:, None] - 1))


def _other_parts(shard: Shard) -> Tensor:
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
