"""Inner steps: gists themselves descend for a while, and where they come to is what a net is to put out.

Regression on what an optimiser found, instead of the loss itself through the net, is one of the two ways of amortised
optimisation (Amos 2023, "Tutorial on amortized optimization", section 2.2). Neither the net nor the frozen LM is asked
for a gradient on the way.

Shapes: B windows of n blocks and q nodes, m vectors a gist, D hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from models.training.dense_pass import Gists


def apart(gists: Gists) -> Gists:
    """The same vectors, leaves of a graph of their own."""
    blocks, *nodes = (vectors.detach().requires_grad_() for vectors in _levels(gists))
    return Gists(blocks, *nodes)


def descended(gists: Gists, loss: Float32[Tensor, ""], rate: float, token_size: Float32[Tensor, ""]) -> Gists:
    """Gists one step down a loss, and off its graph.

    Every gist goes `rate` times its own root mean square, all m vectors together, in the direction of its own gradient:
    how far does not depend on how many tokens see it, on how many windows share a pass, or on the LM's scale. One that
    the loss does not know stays where it is.

    Args:
        gists: of `apart`.
        loss: behind them.
        rate: length of the step, as a share of the gist's.
        token_size: root mean square of the tokens' vectors; that of a gist of zeros, as an untrained constant's is.
    """
    levels = _levels(gists)
    # Nothing is said behind nodes where blocks are only repeated.
    slopes = torch.autograd.grad(loss, levels, allow_unused=True, materialize_grads=True)
    moved = []
    for vectors, slope in zip(levels, slopes, strict=True):
        steepness, size = _size(slope), _size(vectors.detach())
        size = torch.where(size > 0, size, token_size)
        direction = torch.where(steepness > 0, slope / steepness, 0.0)
        moved.append(vectors.detach() - rate * size * direction)
    blocks, *nodes = moved
    return Gists(blocks, *nodes)


def distance(gists: Gists, targets: Gists) -> Float32[Tensor, ""]:
    """Mean square distance of each gist to its target over the target's mean square, mean over all gists; a block's
    counts as a node's."""
    shares = []
    for own, target in zip(_levels(gists), _levels(targets), strict=True):
        distance = (own - target.detach()).square().mean(dim=(2, 3))
        shares.append((distance / _size(target.detach()).square()[..., 0, 0].clamp(min=1e-30)).flatten())
    return torch.cat(shares).mean()


def _levels(gists: Gists) -> tuple[Float32[Tensor, "B _ m D"], ...]:
    return (gists.blocks,) if gists.nodes is None else (gists.blocks, gists.nodes)


def _size(vectors: Float32[Tensor, "B _ m D"]) -> Float32[Tensor, "B _ 1 1"]:
    """Root mean square of each gist."""
    return vectors.square().mean(dim=(2, 3), keepdim=True).sqrt()
