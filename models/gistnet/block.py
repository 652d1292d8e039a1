"""The `block` net: a small transformer over a block's 32 token embeddings alone, without any LM pass."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.gistnet.base import Entries, GistNetSpec, masked, rms_normalised
from models.gistnet.layers import Encoder, PooledHead
from models.gistnet.residual import ResidualGistNet


class BlockGistNet(ResidualGistNet):
    """Cheap and blind to everything before the block; the adapter and its residual are those of `windowed`.

    Raises:
        ModelError: a width that its attention heads do not divide.
    """

    kind = "block"

    def __init__(self, spec: GistNetSpec) -> None:
        super().__init__(spec)
        if spec.hidden_dim % spec.num_heads:
            raise ModelError(
                f"a block net's width {spec.hidden_dim} must be divisible by its {spec.num_heads} attention heads; "
                "set gistnet.num_heads or gistnet.hidden_dim"
            )
        self.block_encoder, self.block_head = self._level(TOKENS_PER_BLOCK)
        self.node_encoder, self.node_head = self._level(self.num_node_entries)
        self._add_keywords()

    def _level(self, num_entries: int) -> tuple[Encoder, PooledHead]:
        spec = self.spec
        encoder = Encoder(
            num_entries=num_entries,
            feature_dim=spec.dim,
            width=spec.hidden_dim,
            num_heads=spec.num_heads,
            num_layers=spec.num_encoder_layers,
        )
        head = PooledHead(
            num_entries=num_entries,
            feature_dim=spec.hidden_dim,
            num_heads=spec.num_heads,
            hidden_dim=spec.hidden_dim,
            num_vectors=spec.num_vectors,
            dim=spec.dim,
        )
        return encoder, head

    @property
    def feature_dim(self) -> int:
        return self.dim

    def _token_features(self, entries: Entries) -> Float32[Tensor, "G T F"]:
        return masked(rms_normalised(entries.embeddings) - self.embedding_mean, entries.mask)

    def _block_change(self, features: Float32[Tensor, "G T F"], entries: Entries) -> Float32[Tensor, "G m D"]:
        return self.block_head(self.block_encoder(features, entries.mask), entries.mask, entries.last)

    def _node_change(self, features: Float32[Tensor, "G T D"], entries: Entries) -> Float32[Tensor, "G m D"]:
        return self.node_head(self.node_encoder(features, entries.mask), entries.mask, entries.last)
