"""The blocks whose keys are nearest to a question, without comparing every key: cells of like keys, nearest first.

Keys stand in cells around centres that spherical k-means found among them (Sivic and Zisserman, "Video Google", 2003;
an inverted file, as vector databases keep). Of a question only the cells with the nearest centres are looked into:
their keys are read from the tree, and their cosines are those of `KeyIndex`. The number of cells grows with the root of
the history, and as many are looked into whatever its length, so that time grows with the root, too. The tree's own
super-blocks would be cells that cost nothing, but what stands together in time is less alike: at the same share of keys
they find fewer of the nearest (docs/sessions.md).

A history of up to `EXACT_BLOCKS` is compared as a whole, and so is what came since the last whole batch of `FOLD`
blocks. Centres are found anew when a history is `STAGE_GROWTH` times as long as when they were. Both happen at fixed
lengths, so what is found depends on the keys and nothing else, not on how the history grew.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from models.focus.dense import (
    CHUNK_KEYS,
    KeySpace,
    Match,
    Vectors,
    check_width,
    cosines,
    key_lengths,
    placed_query,
)
from models.focus.history import TreeReader

EXACT_BLOCKS = 8192
"""Blocks up to which all keys are compared (262,144 tokens): what is read is not worth a cell."""

FOLD = 1024
"""Blocks that get their cells at once, always the same ones; newer ones are compared as they are."""

STAGE_GROWTH = 4
"""Times as many keys, and centres are found anew: all keys are read again, at most a third more in all."""

CELLS_OF_ROOT = 2
"""Cells of a stage, times the root of its keys: 724 from 4.2 M tokens on."""

PROBED_CELLS = 64
"""Cells of mean size that are looked into; the recall this gives is measured in docs/sessions.md."""

KEYS_PER_CELL = 32
"""Keys that centres are found among, for each of them."""

ITERATIONS = 5
"""Of k-means; later ones move hardly any key."""


class KeySearch:
    """Finds the blocks of one context whose keys are nearest to a question; follows the context as it grows.

    Resident are 10 bytes a block (3 MB at 10 M tokens) and the centres (0.3 MB at 128 dimensions); keys stay in the
    tree. Room for as many blocks again is kept for what comes.
    """

    def __init__(self, reader: TreeReader, space: KeySpace, *, array: str) -> None:
        """Find the cells of a version's keys; `array` is their name. Every key is read, and compared with all centres.

        Raises:
            ModelError: the tree's keys have another width than the space.
        """
        self._space = space
        self._array = array
        self._stage = 0
        """Keys among which centres were found; 0 while there are too few for cells."""
        self._centres: Float32[Tensor, "cells D"] = torch.empty((0, len(space.centre)))
        self._num_blocks = 0
        self._folded = 0
        """Blocks that are in cells: a prefix."""
        self._lengths: Float32[np.ndarray, " capacity"] = np.empty(0, np.float32)
        self._cells = np.empty(0, np.uint16)
        self._in_cells = np.empty(0, np.uint32)
        """The folded blocks, cell by cell, ascending in each."""
        self._starts = np.zeros(1, np.int64)
        """Where each cell begins, and the last one ends."""
        self._reader = reader
        self.follow(reader)

    @property
    def space(self) -> KeySpace:
        """Where keys and questions are compared."""
        return self._space

    @property
    def num_blocks(self) -> int:
        """Blocks that are searched: those of the version followed last."""
        return min(self._num_blocks, self._reader.version.num_blocks)

    @property
    def resident_bytes(self) -> int:
        """Of all arrays, and of the room kept for more."""
        centres = self._centres.numel() * self._centres.element_size()
        return self._lengths.nbytes + self._cells.nbytes + self._in_cells.nbytes + self._starts.nbytes + centres

    def follow(self, reader: TreeReader) -> None:
        """Search another version of the context from now on.

        Only new keys are read, and those of a batch when it is full; all of them at a new stage.
        """
        self._reader = reader
        stop = reader.version.num_blocks
        if stop <= self._num_blocks:
            return
        self._reserve(stop)
        stage = _stage_of(stop)
        first, centres = self._folded, self._centres
        if stage != self._stage:
            first, centres = 0, self._found_centres(stage)
        folded = stop // FOLD * FOLD if stage else 0
        for start in range(first, folded, FOLD):
            batch = slice(start, start + FOLD)
            placed = self._space.place(self._keys(np.arange(start, start + FOLD)).float())
            self._lengths[batch] = placed.norm(dim=1).numpy()
            self._cells[batch] = (placed @ centres.T).argmax(dim=1).numpy()
        for start in range(max(folded, self._num_blocks), stop, FOLD):
            blocks = np.arange(start, min(start + FOLD, stop))
            self._lengths[blocks] = key_lengths(self._keys(blocks), self._space)
        if first < folded:
            cells = self._cells[:folded]
            self._in_cells = np.argsort(cells, kind="stable").astype(np.uint32)
            sizes = np.bincount(cells, minlength=len(centres))
            self._starts = np.concatenate([[0], np.cumsum(sizes)])
        # Last, so that a reader that fails leaves what was known to be searched, and is followed anew.
        self._stage, self._centres = stage, centres
        self._folded, self._num_blocks = folded, stop

    def best(
        self, query: Vectors, match: Match, limit: int, stop_block: int | None = None
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """The nearest blocks, the nearest first, of equal ones the newer; and their cosines, as of `KeyIndex.scores`.

        Args:
            query: `(q, D)` of `query_states`.
            match: see `Match`.
            limit: the most blocks to return; fewer only where there are no more.
            stop_block: only blocks before it; by default all.

        Raises:
            ModelError: query and space of different widths, an empty query, or an unknown match.
        """
        rows = placed_query(query, match, self._space)
        stop = self.num_blocks if stop_block is None else max(0, min(stop_block, self.num_blocks))
        blocks = self._candidates(rows, stop, limit)
        directions = self._space.directions(rows)
        scores = np.empty(len(blocks), np.float32)
        for start in range(0, len(blocks), CHUNK_KEYS):
            part = slice(start, start + CHUNK_KEYS)
            scores[part] = cosines(self._keys(blocks[part]), directions, self._space, self._lengths[blocks[part]])
        if limit < 1:
            return blocks[:0], scores[:0]
        if limit < len(scores):
            # Only those that may be among the best are sorted.
            hopeful = scores >= np.partition(scores, -limit)[-limit]
            blocks, scores = blocks[hopeful], scores[hopeful]
        order = np.lexsort((-blocks, -scores))[:limit]
        return blocks[order], scores[order]

    def _candidates(self, rows: Float32[Tensor, "r D"], stop: int, limit: int) -> Int64[np.ndarray, " n"]:
        """Blocks of `[0, stop)` whose keys are compared, ascending."""
        if stop <= EXACT_BLOCKS or self._folded == 0:
            return np.arange(stop)
        folded = min(self._folded, stop)
        left = max(limit, math.ceil(PROBED_CELLS * self._folded / len(self._centres)))
        if left >= folded:
            return np.arange(stop)
        nearest = (self._centres @ rows.T).amax(dim=1).argsort(descending=True, stable=True)
        parts = []
        for cell in nearest.tolist():
            blocks = self._in_cells[self._starts[cell] : self._starts[cell + 1]]
            if folded < self._folded:
                blocks = blocks[: np.searchsorted(blocks, folded)]
            parts.append(blocks)
            left -= len(blocks)
            if left <= 0:
                break
        # In the order they are stored: neighbours are read together.
        old = np.sort(np.concatenate(parts)).astype(np.int64)
        return np.concatenate([old, np.arange(folded, stop)])

    def _found_centres(self, num_keys: int) -> Float32[Tensor, "cells D"]:
        """Spherical k-means over keys spread evenly among the first `num_keys`."""
        num_cells = round(CELLS_OF_ROOT * num_keys**0.5)
        step = max(1, num_keys // (KEYS_PER_CELL * num_cells))
        sample = torch.cat(
            [
                self._space.place(self._keys(np.arange(start, min(start + FOLD * step, num_keys), step)).float())
                for start in range(0, num_keys, FOLD * step)
            ]
        )
        sample = F.normalize(sample, dim=1)
        centres = sample[torch.linspace(0, len(sample) - 1, num_cells).round().long()]
        for _ in range(ITERATIONS):
            cells = (sample @ centres.T).argmax(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, cells, sample)
            # A cell that lost all its keys keeps its centre.
            centres = torch.where(sums.norm(dim=1, keepdim=True) > 1e-6, F.normalize(sums, dim=1), centres)
        return centres

    def _keys(self, blocks: np.ndarray) -> Tensor:
        """`(n, D)`, as stored."""
        keys = self._reader.read(self._array, 1, blocks).flatten(1)
        check_width(keys.shape[1], self._space)
        return keys

    def _reserve(self, num_blocks: int) -> None:
        """Room for so many blocks; twice as much as there was, so that growing copies each but once on average."""
        if num_blocks <= len(self._lengths):
            return
        room = max(num_blocks, 2 * len(self._lengths)) - len(self._lengths)
        self._lengths = np.concatenate([self._lengths, np.empty(room, np.float32)])
        self._cells = np.concatenate([self._cells, np.empty(room, np.uint16)])


def _stage_of(num_blocks: int) -> int:
    """The largest stage of a history: `EXACT_BLOCKS * STAGE_GROWTH^n` keys; 0 where there are fewer."""
    stage, following = 0, EXACT_BLOCKS
    while following <= num_blocks:
        stage, following = following, STAGE_GROWTH * following
    return stage
