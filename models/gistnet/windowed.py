"""The `windowed` net: what the frozen LM's lower layers made of the text so far, pooled a block at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.gistnet.base import Entries, GistNetSpec, masked, rms_normalised
from models.gistnet.layers import PooledHead
from models.gistnet.residual import ResidualGistNet


class WindowedGistNet(ResidualGistNet):
    """Per token [rms(embedding); rms(LM state)] minus the corpus mean, then learned pooling and an adapter.

    The states come from a causal pass over the document's window of 1,024 tokens, so a block knows what was
    said before it and nothing of what follows.
    """

    kind = "windowed"

    def __init__(self, spec: GistNetSpec) -> None:
        super().__init__(spec)
        if spec.lm_layer is None:
            raise ModelError("a windowed net reads the LM's states; its specification names no lm_layer")
        sizes = {
            "num_heads": spec.num_heads,
            "hidden_dim": spec.hidden_dim,
            "num_vectors": spec.num_vectors,
            "dim": spec.dim,
        }
        self.block_head = PooledHead(num_entries=TOKENS_PER_BLOCK, feature_dim=self.feature_dim, **sizes)
        self.node_head = PooledHead(num_entries=self.num_node_entries, feature_dim=spec.dim, **sizes)
        self._add_keywords()

    @property
    def feature_dim(self) -> int:
        return 2 * self.dim

    def _token_features(self, entries: Entries) -> Float32[Tensor, "G T F"]:
        assert entries.hidden is not None
        features = torch.cat(
            (
                rms_normalised(entries.embeddings) - self.embedding_mean,
                rms_normalised(entries.hidden) - self.hidden_mean,
            ),
            dim=-1,
        )
        return masked(features, entries.mask)

    def _block_change(self, features: Float32[Tensor, "G T F"], entries: Entries) -> Float32[Tensor, "G m D"]:
        return self.block_head(features, entries.mask, entries.last)

    def _node_change(self, features: Float32[Tensor, "G T D"], entries: Entries) -> Float32[Tensor, "G m D"]:
        return self.node_head(features, entries.mask, entries.last)
