"""What the trainable nets are made of.

Shapes: G groups, T entries a group, F features an entry, H heads, W width, m vectors a node, D size of a gist.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from models.gistnet.base import take

INITIAL_GAIN = 0.1
"""About the rms of a small LM's token embeddings (0.13 in SmolLM2-135M), so that the adapter's first steps
are of the size of what they are added to."""

INITIAL_STD = 0.02

KEYWORD_GAIN = 2.0
"""Sum of a vector's gains at the start: a head that is torn between several words adds little of any."""


class AttentionPool(nn.Module):
    """H weighted means over a group's entries; learned queries score them, learned anchors prefer places."""

    def __init__(self, num_heads: int, feature_dim: int, num_entries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_heads, feature_dim) * INITIAL_STD)
        # Each head starts on a part of the group of its own; heads that start alike tend to stay alike.
        width = num_entries / num_heads
        centres = (torch.arange(num_heads) + 0.5) * width - 0.5
        offsets = (torch.arange(num_entries) - centres[:, None]) / width
        self.anchors = nn.Parameter(-0.5 * offsets.square())  # (H, T), added to the scores

    def weights(self, x: Float32[Tensor, "G T F"], mask: Bool[Tensor, "G T"]) -> Float32[Tensor, "G H T"]:
        """What each head gives each entry; a head's sum to 1."""
        scores = self.queries @ x.transpose(1, 2) * x.shape[-1] ** -0.5 + self.anchors
        return scores.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1)

    def forward(self, x: Float32[Tensor, "G T F"], mask: Bool[Tensor, "G T"]) -> Float32[Tensor, "G H F"]:
        return self.weights(x, mask) @ x


class Keywords(nn.Module):
    """The mean token and, upon it, how H weighted means of a group's own embeddings differ from it, H for each of m
    vectors: mean + sum of gain · (weighted mean - mean).

    With queries that prefer rare tokens (`models.training.corpus_statistics`) a gist begins as a few words of its block
    in the frozen LM's own vectors. A mean over all words alike is toxic to the LM, and so is the mean token by itself.
    """

    token_mean: Tensor

    def __init__(self, *, num_heads: int, feature_dim: int, num_entries: int, num_vectors: int, dim: int) -> None:
        super().__init__()
        self.pool = AttentionPool(num_heads * num_vectors, feature_dim, num_entries)
        self.gains = nn.Parameter(torch.full((num_vectors, num_heads, 1), KEYWORD_GAIN / num_heads))
        self.register_buffer("token_mean", torch.zeros(dim))

    def forward(
        self,
        features: Float32[Tensor, "G T F"],
        embeddings: Float32[Tensor, "G T D"],
        mask: Bool[Tensor, "G T"],
    ) -> Float32[Tensor, "G m D"]:
        words = (self.pool.weights(features, mask) @ embeddings).unflatten(1, self.gains.shape[:2])
        return self.token_mean + (self.gains * (words - self.token_mean)).sum(dim=2)


class Adapter(nn.Module):
    """gain · (linear + MLP) of P pooled feature vectors, (G, P, F) to (G, m, D); exactly zero at the start.

    The output is not normalised: how far a gist leaves its residual is the net's to learn.
    """

    def __init__(self, num_inputs: int, feature_dim: int, hidden_dim: int, num_vectors: int, dim: int) -> None:
        super().__init__()
        self.shape = (num_vectors, dim)
        self.linear = nn.Linear(num_inputs * feature_dim, num_vectors * dim, bias=False)
        self.expand = nn.Linear(num_inputs * feature_dim, hidden_dim)
        self.project = nn.Linear(hidden_dim, num_vectors * dim, bias=False)
        self.gain = nn.Parameter(torch.full((num_vectors, 1), INITIAL_GAIN))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Float32[Tensor, "G P F"]) -> Float32[Tensor, "G m D"]:
        flat = x.flatten(1)
        change = self.linear(flat) + self.project(F.gelu(self.expand(flat)))
        return self.gain * change.unflatten(-1, self.shape)


class PooledHead(nn.Module):
    """Pooled entries and the sub-spans' last entries, adapted: what is added to the residual of a gist."""

    def __init__(
        self, *, num_entries: int, feature_dim: int, num_heads: int, hidden_dim: int, num_vectors: int, dim: int
    ) -> None:
        super().__init__()
        self.pool = AttentionPool(num_heads, feature_dim, num_entries)
        self.adapter = Adapter(num_heads + num_vectors, feature_dim, hidden_dim, num_vectors, dim)

    def forward(
        self, x: Float32[Tensor, "G T F"], mask: Bool[Tensor, "G T"], last: Int64[Tensor, "G m"]
    ) -> Float32[Tensor, "G m D"]:
        return self.adapter(torch.cat((self.pool(x, mask), take(x, last)), dim=1))


class Encoder(nn.Module):
    """A small pre-norm transformer over a group's entries, every entry seeing every real one."""

    def __init__(self, *, num_entries: int, feature_dim: int, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.input = nn.Linear(feature_dim, width)
        self.places = nn.Parameter(torch.randn(num_entries, width) * INITIAL_STD)
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float32[Tensor, "G T F"], mask: Bool[Tensor, "G T"]) -> Float32[Tensor, "G T W"]:
        x = self.input(x) + self.places
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class EncoderLayer(nn.Module):
    """Self-attention and an MLP of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float32[Tensor, "G T W"], mask: Bool[Tensor, "G T"]) -> Float32[Tensor, "G T W"]:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))  # (G, T, 3, H, W/H)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # each (G, H, T, W/H)
        # Plain products: at these lengths masked SDPA's backward pass is some 20x slower on CPUs.
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        mixed = scores.softmax(dim=-1) @ values
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))
