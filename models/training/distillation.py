"""The objective of a GistNet: behind gists the frozen model should predict what it predicts behind the text.

A step takes a batch of windows, cuts each into many Working Contexts (`sight`), and returns named losses. Distances
between two readers are measured as KL(teacher || student) of the next token, the teacher having read everything raw
(Hinton et al. 2015, "Distilling the knowledge in a neural network", at temperature 1), or as NLL of what really came;
or, without going up to the head, by how far the student's states are from the teacher's after lower layers (Romero et
al. 2015, "FitNets"). Besides, or at first instead, the model may be asked to say a block again from its gist alone (Ge
et al. 2023, "In-context Autoencoder for Context Compression in a Large Language Model"): a denser signal at less cost,
of how to write what the frozen model can read. All of this may also be asked of the gist vectors themselves first, and
the net be taught where they go (`inner_steps`).

Shapes: B windows of n blocks, K = 32 tokens a block, S = (n - 1)·K entries that predict, m vectors a gist, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.training_config import ObjectiveConfig
from models.training.dense_pass import DensePass, Gists, ReadWindows
from models.training.head_loss import HeadLoss, head_loss
from models.training.inner_steps import apart, descended, distance
from models.training.sight import Sight, random_sight
from models.training.stage_clock import StageClock


@dataclass(frozen=True)
class StepLosses:
    """What one batch of windows came to, nats a token but for `states` and `inner` and what they add to `loss`."""

    loss: Float32[Tensor, ""]
    """To be minimised; the only one with a gradient."""
    kl: Float32[Tensor, ""] | None
    """Over the tokens that count; None where the teacher was not asked."""
    nll: Float32[Tensor, ""] | None
    """Over the same; None where nothing was predicted behind gists."""
    states: Float32[Tensor, ""] | None
    """Mean square distance of the student's states to the teacher's over the variance of the teacher's in the window,
    mean over the dimensions of the matched layers: 0 where they agree. None where it was not asked for."""
    repeat: Float32[Tensor, ""] | None
    """NLL of blocks behind their own gist alone; None where it was not asked for."""
    spread: Float32[Tensor, ""]
    """Variance share of the gists: mean square distance to their mean, over their mean square length. Near 0 a net says
    the same of everything."""
    inner: Float32[Tensor, ""] | None = None
    """Mean square distance of the gists to where inner steps brought them, over the mean square there; None without."""


@dataclass(frozen=True)
class Asked:
    """What was asked for behind some gists."""

    loss: Float32[Tensor, ""]
    """All of it, weighed."""
    predicted: HeadLoss | None
    states: Float32[Tensor, ""] | None
    again: HeadLoss | None


@dataclass(frozen=True)
class Fidelity:
    """What gists are worth in windows they were not trained on, nats a token.

    One number for each block that a raw tail may be long: for 0 … 31 tokens of tail, 32 … 63, and so on.
    """

    num_tokens: list[int]
    full: list[float]
    """NLL with everything before seen raw."""
    own: list[float]
    shuffled: list[float]
    """Gists of another window of the batch."""
    mean_gist: list[float]
    """The batch's mean gist everywhere: what is common to all text."""
    repeat_own: float
    """NLL of all blocks' tokens, each block behind its own gist alone."""
    repeat_shuffled: float
    """Behind the gist of another window's block."""
    num_behind_nodes: int = 0
    """Tokens that see some LOD2 gist; 0 where windows are too short for any."""
    node_content: float = float("nan")
    """Of those, behind another window's LOD2 gists minus behind its own, all else the same."""


class Distillation(nn.Module):
    """A GistNet, the LM it is trained for, and the objective. As a module it holds the net's weights, and those of an
    adapter that the LM has, only: the LM's own are neither trained, nor sharded, nor saved."""

    def __init__(self, dense: DensePass, config: ObjectiveConfig) -> None:
        super().__init__()
        self.gistnet = dense.gistnet
        self.adapter = None if dense.lm.adapter is None else dense.lm.adapter.weights
        self.dense = dense
        self.config = config
        self.progress = 1.0
        """Of the run, 0 to 1: how far a curriculum has come. Whoever steps keeps it."""
        self.clock = StageClock(dense.lm.device)
        """Laps `teacher`, `gists`, `student` and `head`; whoever steps laps the rest."""

    def forward(self, ids: Int64[Tensor, "B T"], seeds: Sequence[Sequence[int]]) -> StepLosses:
        """One step's losses.

        Args:
            ids: windows.
            seeds: of each window's cuts.
        """
        config = self.config
        is_behind = config.repeat_share < 1
        windows = self.dense.read(ids, teacher=config.distils, match=config.states_layers if is_behind else ())
        self.clock.lap("teacher")
        gists = self.dense.gists(windows)
        self.clock.lap("gists")
        inner, found = self._inner(windows, gists, seeds) if config.inner_steps > 0 else (None, None)
        if found is None or config.reads_own:
            found = self._asked(windows, gists, seeds)
        loss = found.loss
        if inner is not None:
            share = config.inner_share
            loss = share * inner + (1 - share) * loss if config.reads_own else inner
        predicted, states, again = found.predicted, found.states, found.again
        spread = _spread(gists.blocks)
        if config.spread_floor > 0:
            loss = loss + (1 - spread / config.spread_floor).clamp(min=0)
        losses = StepLosses(
            loss,
            None if predicted is None or windows.teacher is None else predicted.kl.mean(),
            None if predicted is None else predicted.nll.mean(),
            None if states is None else states.detach(),
            None if again is None else again.nll.mean(),
            spread.detach(),
            None if inner is None else inner.detach(),
        )
        self.clock.lap("head")
        return losses

    def _asked(self, windows: ReadWindows, gists: Gists, seeds: Sequence[Sequence[int]]) -> Asked:
        """All that is asked for behind gists; the same seeds ask the same."""
        config = self.config
        behind = 1 - config.repeat_share
        predicted, states = self._behind_gists(windows, gists, seeds) if behind > 0 else (None, None)
        again = self._repeated(windows, gists) if config.repeat_share > 0 else None
        # Not 0 times the other: what was not asked for is not there.
        parts = [
            (behind * (1 - config.states_share), None if predicted is None else predicted.loss),
            (behind * config.states_share, states),
            (config.repeat_share, None if again is None else again.loss),
        ]
        loss = torch.stack([weight * part for weight, part in parts if part is not None]).sum()
        return Asked(loss, predicted, states, again)

    def _inner(
        self, windows: ReadWindows, gists: Gists, seeds: Sequence[Sequence[int]]
    ) -> tuple[Float32[Tensor, ""], Asked]:
        """How far gists are from where a few steps of their own bring them, and what was asked for where they began.

        Blocks and nodes both go, at the same time: a token sees one or the other, so each has to do its part beside the
        other as it will be. A node's vectors go by themselves, not with the blocks they were made of.
        """
        token_size = windows.embeddings.float().square().mean().sqrt()
        moved, first = gists, None
        for _ in range(self.config.inner_steps):
            moved = apart(moved)
            found = self._asked(windows, moved, seeds)
            moved = descended(moved, found.loss, self.config.inner_rate, token_size)
            self.clock.lap("backward")
            first = first or found
        assert first is not None
        return distance(gists, moved), first

    def _behind_gists(
        self, windows: ReadWindows, gists: Gists, seeds: Sequence[Sequence[int]]
    ) -> tuple[HeadLoss | None, Float32[Tensor, ""] | None]:
        """What is predicted behind the gists of some Working Context, and how far states are from the teacher's."""
        config = self.config
        final, states = self.dense.student_states(
            windows,
            gists,
            self._cut(windows, seeds, self._max_gists(windows)),
            config.states_layers,
            whole=config.predicts,
        )
        self.clock.lap("student")
        missed = [_missed(states[n], teacher) for n, teacher in windows.matched.items()]
        predicted = None if final is None else self._predicted(windows, final)
        self.clock.lap("head")
        return predicted, torch.stack(missed).mean() if missed else None

    def _predicted(self, windows: ReadWindows, hidden: Float32[Tensor, "B S D"]) -> HeadLoss:
        """Of every token that counts but the last, whose successor is not known."""
        hidden, targets = hidden[:, :-1], windows.targets[:, :-1]
        teacher = None if windows.teacher is None else windows.teacher[:, :-1]
        if teacher is not None and self.config.scored_share < 1:
            # In each window, so that it does not matter which ones share a pass.
            apart = (hidden.detach().float() - teacher.float()).square().sum(dim=-1)
            scored = apart.topk(max(1, round(self.config.scored_share * apart.shape[1])), dim=1).indices
            targets = targets.gather(1, scored)
            hidden, teacher = (states.take_along_dim(scored[..., None], dim=1) for states in (hidden, teacher))
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        teacher = None if teacher is None else teacher.flatten(0, 1)
        weights = _equal_weights(hidden)
        return head_loss(hidden, targets, weights, self.dense.lm.head_weight, teacher, self.config.kl_share)

    def _repeated(self, windows: ReadWindows, gists: Gists) -> HeadLoss:
        hidden = self.dense.repeat(windows, gists)
        self.clock.lap("student")
        hidden = hidden.flatten(0, 1)
        return head_loss(hidden, windows.ids.flatten(), _equal_weights(hidden), self.dense.lm.head_weight)

    @torch.no_grad()
    def fidelity(self, ids: Int64[Tensor, "B T"], seeds: Sequence[Sequence[int]]) -> Fidelity:
        """Own gists beside their controls on the same cuts; of at least two windows."""
        windows = self.dense.read(ids)
        gists = self.dense.gists(windows)
        sight = self._cut(windows, seeds)
        places = _tail_tokens(sight)[:, :-1] // K
        readers = {"own": gists, "shuffled": gists.rolled(), "mean_gist": gists.averaged()}
        nll = {name: self._nll(windows, self.dense.student(windows, shown, sight)) for name, shown in readers.items()}
        assert windows.teacher is not None
        nll["full"] = self._nll(windows, windows.teacher)
        groups = [places == group for group in range(self.config.max_tail_blocks)]
        counts = [int(group.sum()) for group in groups]
        means = {name: [_mean(values, group) for group in groups] for name, values in nll.items()}
        repeats = [float(self._repeated(windows, readers[name]).nll.mean()) for name in ("own", "shuffled")]
        found = Fidelity(
            counts,
            means["full"],
            means["own"],
            means["shuffled"],
            means["mean_gist"],
            repeat_own=repeats[0],
            repeat_shuffled=repeats[1],
        )
        if gists.nodes is None:
            return found
        behind = torch.from_numpy(sight.sees_nodes()[:, 1:]).repeat_interleave(K, dim=1)[:, :-1]
        others = self._nll(windows, self.dense.student(windows, gists.rolled(blocks=False), sight))
        return replace(found, num_behind_nodes=int(behind.sum()), node_content=_mean(others - nll["own"], behind))

    def _max_gists(self, windows: ReadWindows) -> int | None:
        """Blocks whose gists are seen at this point of a curriculum; None: all."""
        share = self.config.curriculum_share
        if self.progress >= share:
            return None
        return max(1, int(windows.ids.shape[1] // K * self.progress / share))

    def _cut(self, windows: ReadWindows, seeds: Sequence[Sequence[int]], max_gists: int | None = None) -> Sight:
        config = self.config
        num_blocks = windows.ids.shape[1] // K
        return Sight.stacked(
            [
                random_sight(
                    1,
                    num_blocks,
                    np.random.default_rng(seed),
                    max_tail_blocks=config.max_tail_blocks,
                    shown_share=config.shown_share,
                    overlay=config.overlay,
                    max_gists=max_gists,
                    restart_share=config.restart_share,
                )
                for seed in seeds
            ]
        )

    def _nll(self, windows: ReadWindows, hidden: Tensor) -> Float32[Tensor, "B S-1"]:
        hidden, targets = hidden[:, :-1], windows.targets[:, :-1]
        hidden = hidden.flatten(0, 1)
        found = head_loss(hidden, targets.flatten(), _equal_weights(hidden), self.dense.lm.head_weight)
        return found.nll.view(targets.shape).cpu()


def _equal_weights(hidden: Float32[Tensor, "N D"]) -> Float32[Tensor, " N"]:
    """So that the loss is a mean over entries."""
    return torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)


def _tail_tokens(sight: Sight) -> Int64[Tensor, "B S"]:
    """Raw tokens that stand unbroken up to each entry that predicts, itself not counted."""
    of_blocks = torch.from_numpy(sight.tail_tokens()[:, 1:])
    return (of_blocks[:, :, None] + torch.arange(K)).flatten(1)


def _mean(values: Float32[Tensor, "B S"], where: Bool[Tensor, "B S"]) -> float:
    return float(values[where].mean())


def _missed(student: Float32[Tensor, "B S D"], teacher: Float32[Tensor, "B S D"]) -> Float32[Tensor, ""]:
    """Square distance over the teacher's variance in a window, each dimension by itself: a few of them are hundreds of
    times as large as the others in Llama-like models, and would be all that counts."""
    teacher = teacher.float()
    variance = teacher.var(dim=1).clamp(min=1e-6)
    return ((student.float() - teacher).square().mean(dim=1) / variance).mean()


def _spread(gists: Float32[Tensor, "B n m D"]) -> Float32[Tensor, ""]:
    # An untrained constant is zero everywhere.
    return (gists - gists.mean(dim=(0, 1))).square().mean() / gists.square().mean().clamp(min=1e-30)
