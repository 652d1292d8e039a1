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
from torch.nn import functional as F
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
    """How many blocks stood before the first block of each: 0 where it was found first."""
    last_ranks: list[int]
    """How many stood before its last block, those of its own counted: a reader of so many and one more sees it all."""
    things: list[str]
    """What each question is about: answers about one thing are not independent of each other."""

    def add(self, placed: tuple[Tensor, Tensor], things: Sequence[str], of: Tensor | slice = slice(None)) -> None:
        """Some more, as `ranks` gives them."""
        for mine, theirs in zip((self.ranks, self.last_ranks), placed, strict=True):
            mine.extend(theirs[of].tolist())
        self.things.extend(things)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a shard's blocks, as questions: P of them among N blocks."""

    asking: Int64[Tensor, " P"]
    answers: Bool[Tensor, "P N"]
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
        blocks, asked = self.keys_of(shard)
        answers, other_parts = (_between(shard[name], len(blocks)) for name in ("answers", "spans"))
        nll = contrast(asked, blocks, answers, other_parts, keys.temperature)
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
        windows = shard["blocks"].unflatten(0, (-1, self.spec.blocks_per_window)).flatten(1, 2)
        return block_keys(self.net, windows), question_keys(self.net, shard["questions"], shard["mask"])

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
    found: dict[str, Placed] = {name: Placed([], [], []) for name in (*KINDS, PAIRS)}
    for number, (shard, first, (_, asked)) in enumerate(zip(shards, firsts, embedded, strict=True)):
        answers = _between(shard["answers"] + first, len(blocks))
        excluded = torch.zeros(len(asked), len(blocks), dtype=torch.bool)
        for row, word in enumerate(shard["words"].tolist()):
            # The same thing's other facts answer as well.
            excluded[row] = _between(spans[words == word], len(blocks)).any(dim=0)
        placed = ranks(asked, blocks, answers, excluded)
        for kind, name in enumerate(KINDS):
            own = shard["kinds"] == kind
            found[name].add(placed, [str(word) for word in shard["words"][own].tolist()], own)
        if len(shard["pairs"]):
            pairs = _pairs(shard, blocks_per_window, hidden_share=0.5, seed=0)
            sides = (first, len(blocks) - first - len(shard["blocks"]))
            answers, excluded = (F.pad(mask, sides) for mask in (pairs.answers, pairs.excluded))
            placed = ranks(embedder.keys_of_pairs(shard, pairs), blocks, answers, excluded)
            found[PAIRS].add(placed, [f"{number}/{block // blocks_per_window}" for block in pairs.asking.tolist()])
    return found


def _pairs(shard: Shard, blocks_per_window: int, hidden_share: float, seed: int) -> Pairs:
    asking = shard["pairs"][:, 0]
    hides = torch.rand(len(asking), 1, generator=torch.Generator().manual_seed(seed)) < hidden_share
    own = shard["pair_own"]
    mask = torch.where(hides & own.any(dim=1, keepdim=True), own, torch.ones_like(own))
    numbers = torch.arange(len(shard["blocks"]))[None]
    same_window = numbers // blocks_per_window == asking[:, None] // blocks_per_window
    answers = _between(shard["pairs"][:, [1, 1]], len(shard["blocks"]))
    return Pairs(asking, answers, mask, same_window & (numbers >= asking[:, None] - 1))


def _between(ends: Tensor, count: int) -> Tensor:
    """`(R, count)`: which of so many blocks lie from the first to the last that each of R rows names."""
    numbers = torch.arange(count)[None]
    return (numbers >= ends[:, :1]) & (numbers <= ends[:, 1:])


def start_trainer(spec: KeyTrainerSpec, net: GistNet) -> Any:
    """A `KeyTrainer` in an actor of its own.

    Raises:
        ResourceError: the cluster cannot hold it.
    """
    request = {"CPU": float(spec.num_threads)}
    check_resources([request], "training routing keys")
    remote: Any = ray.remote(KeyTrainer)
    return remote.options(num_cpus=spec.num_threads).remote(spec, net)
