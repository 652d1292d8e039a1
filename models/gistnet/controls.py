"""Nets that show what a trained one must beat. None reads the LM's states; only `constant` learns."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional as F

from models.gistnet.base import Entries, GistNet, GistNetSpec


class ConstantGistNet(GistNet):
    """The same learned vectors for every block and others for every node: a soft prompt that says nothing.

    A net that ignores its input scores 12-14% "recovered" this way; only what lies above it is content.
    Untrained it is zero, the one vector that claims no token.
    """

    kind = "constant"

    def __init__(self, spec: GistNetSpec) -> None:
        super().__init__(spec)
        self.block_constant = nn.Parameter(torch.zeros(spec.num_vectors, spec.dim))
        self.node_constant = nn.Parameter(torch.zeros(spec.num_vectors, spec.dim))

    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]:
        return self.block_constant.repeat(entries.mask.shape[0], 1, 1)

    def _node_gists(self, entries: Entries, lod: int) -> Float32[Tensor, "G m D"]:
        return self.node_constant.repeat(entries.mask.shape[0], 1, 1)


class LastTokenGistNet(GistNet):
    """The last token's embedding (of each of m sub-spans), the last child's gist; recovers some 5%."""

    kind = "last_token"

    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]:
        return entries.last_embeddings

    def _node_gists(self, entries: Entries, lod: int) -> Float32[Tensor, "G m D"]:
        return entries.last_embeddings


class MeanGistNet(GistNet):
    """The mean embedding of each of m sub-spans: toxic to a frozen LM, worse than no context at all."""

    kind = "mean"

    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]:
        last = entries.last[..., None]  # (G, m, 1)
        before = torch.cat((last.new_full((last.shape[0], 1, 1), -1), last[:, :-1]), dim=1)
        place = torch.arange(entries.mask.shape[1], device=last.device)
        # Of fewer than m entries some sub-spans are empty; those take the entry they share.
        inside = ((place > before) & (place <= last)) | (place == last)  # (G, m, T)
        weights = inside.float()
        return weights @ entries.embeddings / weights.sum(dim=-1, keepdim=True)

    def _node_gists(self, entries: Entries, lod: int) -> Float32[Tensor, "G m D"]:
        return self._block_gists(entries)


class RescaledMeanGistNet(MeanGistNet):
    """The mean's direction, as long as its block's embeddings are on average: a mean of vectors that differ is short,
    and this tells whether that is what makes it toxic."""

    kind = "rescaled_mean"

    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]:
        lengths = entries.embeddings.norm(dim=-1).sum(dim=1) / entries.mask.sum(dim=1)
        return F.normalize(super()._block_gists(entries), dim=-1) * lengths[:, None, None]
