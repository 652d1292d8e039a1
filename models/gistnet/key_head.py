"""Projected routing keys: which of a group's tokens count for finding it, and in which directions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn


class KeyHead(nn.Module):
    """Weighs a group's tokens and projects them to the width of routing keys.

    Before anything is measured or learned all tokens weigh the same, and the projection is an orthonormal one drawn at
    random, which keeps angles about as they are. Not trained with the gists: nothing of their loss depends on it.
    What a question asks for is said by other words than what a text says it is about, so each has weights of its own;
    the projection is common to both.
    """

    def __init__(self, dim: int, key_dim: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(dim, key_dim), requires_grad=False)
        if not self.projection.is_meta:
            # Of no generator but its own: nets with and without a head have the same other weights.
            nn.init.orthogonal_(self.projection, generator=torch.Generator().manual_seed(0))
        self.query = nn.Parameter(torch.zeros(dim), requires_grad=False)
        """Weighs the tokens of a block by its product with them."""
        self.question = nn.Parameter(torch.zeros(dim), requires_grad=False)
        """Weighs those of a question."""

    def forward(
        self, x: Float32[Tensor, "*G T D"], mask: Bool[Tensor, "*G T"], *, asking: bool = False
    ) -> Float32[Tensor, "*G T D_key"]:
        """What each token adds to a key, or with `asking` to a question; those that are not there, nothing."""
        scores = (x @ (self.question if asking else self.query)) * x.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) * mask.sum(dim=-1, keepdim=True)
        return weights[..., None] * (x @ self.projection)
