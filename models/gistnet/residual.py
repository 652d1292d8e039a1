"""What the trainable nets share: a residual that is sane before any training, and levels of any depth."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from cluster.config import TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.gistnet.base import Entries, GistNet, GistNetSpec, rms_normalised
from models.gistnet.layers import INITIAL_STD, Keywords

LAST_TOKEN_SHARE = 0.8
"""Of the last token's embedding in an untrained gist. A mean of embeddings is toxic to the LM instead."""

NUM_LOD_EMBEDDINGS = 8
"""Levels 2 … 9 are told apart; higher ones (over 32^9 tokens) share the last."""


class ResidualGistNet(GistNet):
    """0.8 · E[last token] (or, with `num_keywords`, a few of the block's words) + constant + a learned change that
    starts at exactly zero; above LOD1 the last child's gist + constant + change. Slot j of m takes the last entry of
    the j-th of m equal sub-spans.

    The levels from 2 on share one set of parameters and are told apart by an embedding of the level.

    Raises:
        ModelError: a specification without heads or width.
    """

    def __init__(self, spec: GistNetSpec) -> None:
        super().__init__(spec)
        if spec.num_heads < 1 or spec.hidden_dim < 1:
            raise ModelError(f"a {self.kind} net needs pooling heads and an adapter; {spec} has none")
        self.block_constant = nn.Parameter(torch.zeros(spec.num_vectors, spec.dim))
        self.node_constant = nn.Parameter(torch.zeros(spec.num_vectors, spec.dim))
        self.keywords: Keywords | None = None
        self.lod_embedding = nn.Parameter(torch.randn(NUM_LOD_EMBEDDINGS, spec.dim) * INITIAL_STD)

    @property
    def num_node_entries(self) -> int:
        """Child vectors of a node."""
        return TOKENS_PER_BLOCK * self.num_vectors

    def _add_keywords(self) -> None:
        """Called last by nets, so that the weights of one without keywords are the same whether it could have them."""
        if self.spec.num_keywords:
            self.keywords = Keywords(
                num_heads=self.spec.num_keywords,
                feature_dim=self.feature_dim,
                num_entries=TOKENS_PER_BLOCK,
                num_vectors=self.spec.num_vectors,
                dim=self.spec.dim,
            )

    @property
    @abc.abstractmethod
    def feature_dim(self) -> int:
        """F: of what is known of a token."""

    @abc.abstractmethod
    def _token_features(self, entries: Entries) -> Float32[Tensor, "G T F"]:
        """What is known of each token, the corpus mean taken off, padding zeroed."""

    @abc.abstractmethod
    def _block_change(self, features: Float32[Tensor, "G T F"], entries: Entries) -> Float32[Tensor, "G m D"]: ...

    @abc.abstractmethod
    def _node_change(self, features: Float32[Tensor, "G T D"], entries: Entries) -> Float32[Tensor, "G m D"]: ...

    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]:
        features = self._token_features(entries)
        if self.keywords is None:
            residual = LAST_TOKEN_SHARE * entries.last_embeddings
        else:
            residual = self.keywords(features, entries.embeddings, entries.mask)
        return residual + self.block_constant + self._block_change(features, entries)

    def _node_gists(self, entries: Entries, lod: int) -> Float32[Tensor, "G m D"]:
        level = self.lod_embedding[min(lod - 2, NUM_LOD_EMBEDDINGS - 1)]
        features = rms_normalised(entries.embeddings) + level
        residual = entries.last_embeddings + self.node_constant
        return residual + self._node_change(features, entries)
