"""Whose gists stand in for a history: those the tree holds, or those another net makes of the same tokens.

Gists of other nets are made window by window as compaction makes them and rounded to the dtype the tree stores, so
that a net is measured as its own tree would show it. A net's constant, the mean of its gists, comes from a sample
that is spread evenly over the context: it says what is common to all text and nothing of any place.

Shapes: n nodes, m vectors a node, D the LM's hidden size.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from actors.compactor import encoding_of
from actors.evaluation.places import Place
from actors.evaluation.planted import PlantedNodes
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.focus.history import blocks_per_node
from models.gistnet import GistNet
from models.node_encoder import NodeEncoder
from models.window_encoder import BLOCKS_PER_WINDOW, WINDOW_TOKENS, WindowEncoder
from storage.contract import DocumentInfo, TreeReader
from storage.schema import GISTS, KEYS

TREE = "tree"
"""Name of the tree's own gists."""

SAMPLE_NODES = 4096
"""Stored nodes of a level whose mean is the tree's constant."""

SAMPLE_WINDOWS = 16
"""Windows of 1,024 tokens another net's constant is made of; 512 gists leave 4% of a gist's spread in it."""

HISTORIES_KEPT = 64
"""Encoded histories a source remembers: each is needed twice, as own gists and as a stranger's."""


class GistSource(abc.ABC):
    """Gists of any history of one context."""

    name: str
    """As it stands in reports."""
    num_vectors: int
    """m."""

    @abc.abstractmethod
    def nodes(self, place: Place, lod: int) -> Float32[Tensor, "n m D"]:
        """Gists of the nodes of a level that lie wholly inside a place's history, which begins at one of them."""

    @abc.abstractmethod
    def constant(self, lod: int) -> Float32[Tensor, "m D"]:
        """The mean gist of a level."""

    def spread(self, place: Place, lod: int) -> float:
        """Mean square distance of a history's gists to the constant, over their mean square length: near 0 where a
        net says the same of everything."""
        gists = self.nodes(place, lod)
        length = float(gists.square().mean())
        return float((gists - self.constant(lod)).square().mean()) / length if length > 0 else 0.0


class TreeGists(GistSource):
    """What the tree holds."""

    def __init__(self, reader: TreeReader) -> None:
        self.name = TREE
        self.num_vectors = reader.version.encoding.spec(GISTS).rows_per_node
        self._reader = reader
        self._constants: dict[int, Tensor] = {}

    def nodes(self, place: Place, lod: int) -> Float32[Tensor, "n m D"]:
        size = blocks_per_node(lod)
        return self._reader.read(GISTS, lod, np.arange(place.first_block // size, place.stop_block // size)).float()

    def constant(self, lod: int) -> Float32[Tensor, "m D"]:
        if lod not in self._constants:
            num_nodes = self._reader.version.num_nodes(lod)
            sample = np.unique(np.linspace(0, num_nodes - 1, SAMPLE_NODES).astype(np.int64))
            self._constants[lod] = self._reader.read(GISTS, lod, sample).float().mean(dim=0)
        return self._constants[lod]


@dataclass(frozen=True, eq=False)
class _Levels:
    """Gists and keys of consecutive blocks, and of the super-blocks they make."""

    blocks: PlantedNodes
    super_blocks: PlantedNodes | None


class EncodedGists(GistSource):
    """What a net makes of the tokens, encoded when it is asked for.

    Raises:
        ModelError: a net that does not fit the LM.
    """

    def __init__(self, name: str, gistnet: GistNet, lm: BaseLM, reader: TreeReader) -> None:
        self.name = name
        self.num_vectors = gistnet.num_vectors
        self._reader = reader
        self._windows = WindowEncoder(lm, gistnet)
        self._nodes = NodeEncoder(gistnet)
        dtype = reader.version.encoding.spec(GISTS).dtype
        self._encoding = encoding_of(gistnet, reader.version.encoding.compute_dtype, dtype)
        self._constants: dict[int, Tensor] = {}
        self._levels = functools.lru_cache(HISTORIES_KEPT)(self._encode)

    def nodes(self, place: Place, lod: int) -> Float32[Tensor, "n m D"]:
        return self._of_level(self._levels(place.first_block, place.stop_block), lod)

    def constant(self, lod: int) -> Float32[Tensor, "m D"]:
        if lod not in self._constants:
            sample = [self._encode(first, stop) for first, stop in _sample_windows(self._reader.documents())]
            gists = torch.cat([self._of_level(levels, lod) for levels in sample])
            self._constants[lod] = gists.mean(dim=0)
        return self._constants[lod]

    def _of_level(self, levels: _Levels, lod: int) -> Float32[Tensor, "n m D"]:
        nodes = levels.blocks if lod == 1 else levels.super_blocks
        assert nodes is not None
        return nodes.arrays[GISTS].float()

    def _encode(self, first_block: int, stop_block: int) -> _Levels:
        """Blocks of one document, from the windows of it they lie in; text behind them changes no gist."""
        start = self._reader.document_at(first_block).first_block
        skipped = (first_block - start) % BLOCKS_PER_WINDOW
        tokens, counts = self._reader.tokens(first_block - skipped, stop_block - first_block + skipped)
        ids = tokens[np.arange(K) < counts[:, None]]
        windows = [ids[at : at + WINDOW_TOKENS] for at in range(0, len(ids), WINDOW_TOKENS)]
        encoded = self._windows.encode_windows(windows)
        num_blocks = stop_block - first_block
        blocks = PlantedNodes.of(
            self._encoding,
            1,
            np.arange(num_blocks),
            {
                GISTS: np.concatenate([window.gists for window in encoded])[skipped * self.num_vectors :],
                KEYS: np.concatenate([window.keys for window in encoded])[skipped:],
            },
        )
        return _Levels(blocks, self._super_blocks(blocks, num_blocks // BLOCKS_PER_SUPER_BLOCK))

    def _super_blocks(self, blocks: PlantedNodes, count: int) -> PlantedNodes | None:
        if count == 0:
            return None
        gists, keys = (blocks.arrays[name][: count * K].float().unflatten(0, (count, K)) for name in (GISTS, KEYS))
        nodes = self._nodes.encode_nodes(gists.numpy(), keys.flatten(2).numpy(), 2)
        return PlantedNodes.of(self._encoding, 2, np.arange(count), {GISTS: nodes.gists, KEYS: nodes.keys})


def _sample_windows(documents: list[DocumentInfo]) -> list[tuple[int, int]]:
    """Blocks `[first, stop)` of windows spread evenly over the context; whole ones where there is any."""
    windows = [
        (first, min(first + BLOCKS_PER_WINDOW, document.first_block + document.num_blocks))
        for document in documents
        for first in range(document.first_block, document.first_block + document.num_blocks, BLOCKS_PER_WINDOW)
    ]
    whole = [(first, stop) for first, stop in windows if stop - first == BLOCKS_PER_WINDOW]
    chosen = whole or windows
    picks = np.unique(np.linspace(0, len(chosen) - 1, SAMPLE_WINDOWS).astype(np.int64))
    return [chosen[pick] for pick in picks.tolist()]
