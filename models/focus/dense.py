"""Dense retrieval: which blocks of a history are like the text at hand, by the routing keys the tree stores.

A block has one key, the mean of its tokens' states, and such keys are far from spread evenly: after 4 to 8 layers of
SmolLM2 their common part is 92% of a key's square, most of it in four of 576 dimensions, and drowns the rest.
`KeySpace` measures what a history's keys share, and cosines are taken relative to it: without their centre, and with
whitening in the metric of their own spread. Measured with facts planted in 49,152 tokens of code, as many lookalikes
as facts, the right one of 1,536 blocks was among the first four (pooled, the query's last 20 tokens):

    keys of layer     cosine   centred   whitened
    4                   21%      21%        96%
    8                   19%      10%        71%

`pooled` beat `max_sim` in each of these (layer 4, whitened: 96% against 35%). Summing over the query's tokens instead
of taking the best one is no third choice: against a single key a block, a sum of cosines is the cosine of the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from cluster.config import SLOTS_PER_SUPER_BLOCK as WINDOW_TOKENS
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.focus.history import TreeReader
from models.gistnet import GistNet
from models.gistnet.build import check_fits

Match = Literal["pooled", "max_sim"]
"""`pooled`: the query as one vector, made as a block's key is. `max_sim`: its best token."""

CHUNK_KEYS = 4096
"""Keys in memory at a time: about 40 MB at 576 dimensions, copies included, however long the history."""

SAMPLE_KEYS = 8192
"""Keys a space is measured from at most: 14 a dimension at 576."""

RIDGE = 0.1
"""Share of the mean variance that whitening adds to every direction. Recall is flat around it at 49k tokens; at 4k
(128 keys in 576 dimensions) less than it amplifies noise, and costs 10 to 14 points of recall at one."""

EPSILON = 1e-12

Vectors = Float[Tensor, "n D"] | Float[np.ndarray, "n D"]


@dataclass(frozen=True, eq=False)
class KeySpace:
    """Where keys and queries are compared: `x` stands at `(x - centre) @ whitening`, whose columns are directions in
    which keys differ, the one where they do most last."""

    centre: Float32[Tensor, " D"]
    whitening: Float32[Tensor, "D D"] | None = None

    @classmethod
    def of(cls, keys: Vectors, *, whiten: bool = True, ridge: float = RIDGE) -> Self:
        """The space of some keys: their mean and, with `whiten`, the inverse root of their covariance.

        Keys that do not differ (one, or copies) are only centred; of none, the space is the plain one.
        """
        values = _floats(keys)
        if len(values) == 0:
            return cls.plain(values.shape[1])
        centre = values.mean(dim=0)
        centred = values - centre
        covariance = (centred.T @ centred).double() / len(values)
        mean_variance = covariance.diagonal().mean()
        if not whiten or mean_variance <= EPSILON:
            return cls(centre)
        variances, directions = torch.linalg.eigh(covariance)
        scales = (variances.clamp(min=0) + ridge * mean_variance).rsqrt()
        return cls(centre, (directions * scales).float())

    @classmethod
    def plain(cls, dim: int) -> Self:
        """The space of vectors as they are."""
        return cls(torch.zeros(dim))

    @classmethod
    def of_net(cls, gistnet: GistNet, reader: TreeReader, *, array: str) -> Self:
        """Where the keys that a net made of a tree are compared with questions, by its `key_metric`."""
        if gistnet.spec.key_metric == "cosine":
            return cls.plain(gistnet.key_dim)
        return cls.of_tree(reader, array=array)

    @classmethod
    def of_tree(
        cls,
        reader: TreeReader,
        first_block: int = 0,
        stop_block: int | None = None,
        *,
        array: str,
        whiten: bool = True,
        ridge: float = RIDGE,
    ) -> Self:
        """The space of a history's keys, from a fixed random sample of them; `array` is the name of the keys.

        Raises:
            NodeMissingError: blocks outside the version.
        """
        stop = reader.version.num_blocks if stop_block is None else stop_block
        blocks = np.arange(first_block, stop)
        if len(blocks) > SAMPLE_KEYS:
            blocks = np.sort(np.random.default_rng(0).choice(blocks, SAMPLE_KEYS, replace=False))
        return cls.of(reader.read(array, 1, blocks).flatten(1), whiten=whiten, ridge=ridge)

    def place(self, vectors: Float32[Tensor, "n D"]) -> Float32[Tensor, "n D"]:
        """Where vectors stand."""
        centred = vectors - self.centre
        return centred if self.whitening is None else centred @ self.whitening

    def directions(self, placed: Float32[Tensor, "r D"]) -> Float32[Tensor, "D r"]:
        """What centred keys are multiplied with instead of being placed: the products are those with `placed` rows."""
        return placed.T if self.whitening is None else self.whitening @ placed.T


def query_states(
    lm: BaseLM, gistnet: GistNet, tokens: np.ndarray, num_query_tokens: int | None = None
) -> Float32[Tensor, "q D_key"]:
    """What a raw tail's tokens would add to a routing key if they were a block.

    Nets that read the LM take the state after their key layer, from one causal pass as over a document's window; the
    others take token embeddings.

    Args:
        lm: the tree's base LM; at least the layers the net reads.
        gistnet: the tree's net.
        tokens: 1 … 1,024 ids.
        num_query_tokens: states of only the last so many; those before them are left context. The question at hand
            is in a few tokens: at 8 to 20 recall was best, at 120 hardly any was left.

    Raises:
        ModelError: another number of tokens (of either), or a net that does not fit the LM.
    """
    check_fits(gistnet, lm)
    if not 1 <= len(tokens) <= WINDOW_TOKENS:
        raise ModelError(
            f"a query is read in one window of 1 to {WINDOW_TOKENS} tokens, not {len(tokens)}; give the last ones"
        )
    num_query_tokens = len(tokens) if num_query_tokens is None else num_query_tokens
    if not 1 <= num_query_tokens <= len(tokens):
        raise ModelError(f"of {len(tokens)} tokens, {num_query_tokens} cannot be the query")
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))[None].to(lm.device)
    with torch.no_grad():
        states = lm.embed(ids)
        if gistnet.key_layer is not None:
            states = lm.hidden_states(states, [gistnet.key_layer])[gistnet.key_layer]
        chosen = states[0, -num_query_tokens:].to(gistnet.embedding_mean.device)
        there = torch.ones(num_query_tokens, dtype=torch.bool, device=chosen.device)
        return gistnet.key_rows(chosen, there, asking=True).cpu()


def dense_scores(
    keys: Vectors,
    query: Vectors,
    match: Match,
    centre: Vectors | None = None,
    whitening: Vectors | None = None,
) -> Float32[np.ndarray, " n"]:
    """Cosine of every key with a query, -1 … 1; a key (or query) at the centre itself scores 0.

    Args:
        keys: `(n, D)`, of any float dtype; read in chunks.
        query: `(q, D)` of `query_states`. They are brought to the keys' length, 1, before anything is subtracted.
        match: see `Match`.
        centre: `(D,)`, what is subtracted from both; None for nothing.
        whitening: `(D, D)`, the metric of cosines; None for the plain one.

    Raises:
        ModelError: keys, query and space of different widths, an empty query, or an unknown match.
    """
    values = torch.as_tensor(keys)
    origin = torch.zeros(values.shape[1]) if centre is None else _floats(centre)
    space = KeySpace(origin, None if whitening is None else _floats(whitening))
    directions = space.directions(placed_query(query, match, space))
    check_width(values.shape[1], space)
    chunks = (values[first : first + CHUNK_KEYS] for first in range(0, len(values), CHUNK_KEYS))
    parts = [cosines(chunk, directions, space, key_lengths(chunk, space)) for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


class KeyIndex:
    """The keys of a history, for many queries: their lengths in the space, 4 bytes a block, are computed once.

    With whitening those take 20 times as long as a query: 2.2 s against 0.1 s at 312,500 keys (10 M tokens), pooled.
    """

    def __init__(
        self,
        reader: TreeReader,
        space: KeySpace,
        first_block: int = 0,
        stop_block: int | None = None,
        *,
        array: str,
    ) -> None:
        """Index blocks `[first_block, stop_block)`, by default all; `array` is the name of the keys.

        Raises:
            NodeMissingError: blocks outside the version.
            ModelError: the tree's keys have another width than the space.
        """
        self._reader = reader
        self._space = space
        self._first = first_block
        self._stop = reader.version.num_blocks if stop_block is None else stop_block
        self._array = array
        self._key_lengths = np.empty(max(0, self._stop - first_block), np.float32)
        for offset, keys in self._chunks():
            self._key_lengths[offset : offset + len(keys)] = key_lengths(keys, space)

    def scores(self, query: Vectors, match: Match) -> Float32[np.ndarray, " n"]:
        """`dense_scores` of the blocks, in timeline order."""
        directions = self._space.directions(placed_query(query, match, self._space))
        out = np.empty(len(self._key_lengths), np.float32)
        for offset, keys in self._chunks():
            part = slice(offset, offset + len(keys))
            out[part] = cosines(keys, directions, self._space, self._key_lengths[part])
        return out

    def grown(self, reader: TreeReader) -> KeyIndex:
        """The same index over a later version of the tree, to its last block; keys there already are not read again."""
        other = copy.copy(self)
        other._reader = reader
        other._stop = reader.version.num_blocks
        known = len(self._key_lengths)
        other._key_lengths = np.empty(max(known, other._stop - self._first), np.float32)
        other._key_lengths[:known] = self._key_lengths
        for offset, keys in other._chunks(known):
            other._key_lengths[offset : offset + len(keys)] = key_lengths(keys, self._space)
        return other

    def over(self, reader: TreeReader, changed_blocks: np.ndarray) -> KeyIndex:
        """The same index over a reader that differs in some blocks (in their place, not in number)."""
        other = copy.copy(self)
        other._reader = reader
        other._key_lengths = self._key_lengths.copy()
        blocks = np.asarray(changed_blocks, np.int64)
        blocks = blocks[(blocks >= self._first) & (blocks < self._stop)]
        if len(blocks):
            keys = reader.read(self._array, 1, blocks).flatten(1)
            other._key_lengths[blocks - self._first] = key_lengths(keys, self._space)
        return other

    def _chunks(self, skipped: int = 0) -> Iterator[tuple[int, Tensor]]:
        """`(offset, keys (n, D))` of consecutive blocks, without the first `skipped`."""
        for first in range(self._first + skipped, self._stop, CHUNK_KEYS):
            blocks = np.arange(first, min(first + CHUNK_KEYS, self._stop))
            keys = self._reader.read(self._array, 1, blocks).flatten(1)
            check_width(keys.shape[1], self._space)
            yield first - self._first, keys


def _floats(values: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(values).detach().to("cpu", torch.float32)


def check_width(width: int, space: KeySpace) -> None:
    if width != len(space.centre):
        raise ModelError(
            f"vectors of {width} dimensions cannot be compared with others of {len(space.centre)}; take keys, query "
            "and space from one net"
        )


def placed_query(query: Vectors, match: Match, space: KeySpace) -> Float32[Tensor, "r D"]:
    """A query's rows where keys are compared with them, of length 1: one with `pooled`, with `max_sim` one a token.

    Raises:
        ModelError: query and space of different widths, an empty query, or an unknown match.
    """
    rows = _floats(query)
    if match not in {"pooled", "max_sim"}:
        raise ModelError(f"there is no match {match!r}; use pooled or max_sim")
    if len(rows) == 0:
        raise ModelError("a query needs at least one token")
    check_width(rows.shape[1], space)
    if match == "pooled":
        rows = rows.mean(dim=0, keepdim=True)
    return F.normalize(space.place(F.normalize(rows, dim=-1)), dim=-1)


def key_lengths(keys: Tensor, space: KeySpace) -> Float32[np.ndarray, " n"]:
    """How long keys `(n, D)` are, seen from the centre of a space."""
    return space.place(_floats(keys)).norm(dim=-1).numpy()


def cosines(
    keys: Tensor, directions: Float32[Tensor, "D r"], space: KeySpace, lengths: Float32[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """The best cosine of every key `(n, D)` with a query's rows.

    Args:
        keys: of any float dtype.
        directions: `space.directions` of the query's rows.
        space: where they are compared.
        lengths: `key_lengths` of the keys.
    """
    products = ((_floats(keys) - space.centre) @ directions).amax(dim=1).numpy()
    # Where a key is the centre up to rounding, its direction is noise.
    return np.where(lengths > 1e-6, products / np.maximum(lengths, EPSILON), 0.0).astype(np.float32)
