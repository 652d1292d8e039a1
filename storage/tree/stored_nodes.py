"""The nodes of one stored array of one level, wherever they are: in sealed segments or in the journal.

Single nodes and consecutive ones are sliced out of their segment's map. Nodes in any order are gathered from all maps
at once, by address: the time of the same gather from one flat file, where a call a segment took four times as long.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, NodeMissingError
from storage.contract import Version
from storage.schema import StoredArray
from storage.tree import journal
from storage.tree.journal import Level, Run
from storage.tree.sealing import array_spec
from storage.tree.segment import CRC_BYTES, SegmentArray, window_over


@dataclass(frozen=True)
class Extent:
    """Consecutive nodes in one segment."""

    first: int
    count: int
    """Of the segment's array."""
    stop: int
    """Nodes from here on are not of this branch, though the segment may hold some that followed on its parent."""
    folder: Path


class NodePlaces(Protocol):
    """Who knows where a version's nodes are."""

    @property
    def version(self) -> Version:
        """The pinned version."""
        ...

    def extents(self, level: Level) -> list[Extent]:
        """A level's sealed nodes, in order."""
        ...

    def run(self, level: Level, index: int) -> Run | None:
        """The journal's run that holds a node, or None when the journal does not hold it (any more)."""
        ...


@dataclass
class _MappedExtent:
    """An extent, and its array once that is mapped."""

    extent: Extent
    array: SegmentArray | None = None

    @property
    def first(self) -> int:
        return self.extent.first

    @property
    def stop(self) -> int:
        return self.extent.stop


class StoredNodes:
    """Copies of the nodes of one stored array."""

    def __init__(self, places: NodePlaces, level: Level, stored: StoredArray, num_nodes: int) -> None:
        self._places = places
        self._level = level
        self._stored = stored
        self.num_nodes = num_nodes
        # Tokens lie flat in a segment: 32 rows of one number a block.
        flat = level.encoding_id == journal.BLOCKS
        self._rows = stored.width if flat else stored.rows_per_node
        self._shape = (stored.rows_per_node, stored.width)
        self._extents: list[_MappedExtent] = []
        # Sibling groups, each a chunk of its segment, that may be gathered: mapped, and their checksums are right.
        self._checked = np.zeros(-(-num_nodes // K), bool)
        self.refresh()

    def refresh(self) -> None:
        """Learn of segments sealed since."""
        # A segment that was replaced by a shorter one stays mapped for those who read it already.
        known = {extent.first: extent for extent in self._extents if extent.array is not None}
        found = self._places.extents(self._level)
        stop = 0
        for extent in found:
            if extent.first < stop or extent.first % K or extent.count % K or extent.count <= 0:
                raise CorruptTreeError(
                    f"the catalogue's row of segment {extent.folder.name} is damaged: it says LOD{self._level.lod} "
                    f"nodes {extent.first} to {extent.first + extent.count - 1}. Run `tree verify` and restore the "
                    "catalogue from a backup."
                )
            stop = extent.stop
        self._extents = [known.get(extent.first) or _MappedExtent(extent) for extent in found]
        self._starts = [extent.first for extent in self._extents]
        self._start_column = np.array(self._starts, np.int64)
        # By position among the extents, counted from 1: what precedes the first one ends at 0 and so holds nothing.
        self._stop_column = np.array([0, *(extent.stop for extent in self._extents)], np.int64)
        self._open_window()

    def _open_window(self) -> None:
        """Let `gather` see every segment mapped by now."""
        mapped = [extent.array for extent in self._extents if extent.array is not None]
        self._num_in_window = len(mapped)
        if not mapped:
            return
        self._window, base = window_over(mapped, self._stored.node_bytes)
        # Where node 0 would lie if the segment reached down to it; a checksum stands between groups.
        self._origins = np.zeros(len(self._extents) + 1, np.int64)
        for position, extent in enumerate(self._extents, start=1):
            if extent.array is not None:
                before = extent.first * self._stored.node_bytes + extent.first // K * CRC_BYTES
                self._origins[position] = extent.array.address - base - before

    def _sealed(self, index: int) -> _MappedExtent | None:
        position = bisect.bisect_right(self._starts, index) - 1
        if position < 0:
            return None
        extent = self._extents[position]
        return extent if index < extent.stop else None

    def _map(self, mapped: _MappedExtent) -> SegmentArray:
        if mapped.array is None:
            try:
                mapped.array = self._opened(mapped.extent)
            except CorruptTreeError:
                if mapped.extent.folder.exists():
                    raise
                # Since our look at the extents a shorter one may have taken its place.
                found = self._places.extents(self._level)
                mapped.extent = next((e for e in found if e.first == mapped.first), mapped.extent)
                mapped.array = self._opened(mapped.extent)
        return mapped.array

    def _opened(self, extent: Extent) -> SegmentArray:
        return SegmentArray(extent.folder, array_spec(self._level, self._stored, extent.count))

    def _check(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.num_nodes:
            unit = "block" if self._level.encoding_id == journal.BLOCKS else f"LOD{self._level.lod} node"
            raise NodeMissingError(
                f"{unit}s {first} to {first + count - 1} were asked for; version {self._places.version.seq} of context "
                f"{self._places.version.context!r} has {self.num_nodes}"
            )

    def nodes(self, first: int, count: int) -> np.ndarray:
        """Copy of consecutive nodes: `(count, rows_per_node, width)`."""
        self._check(first, count)
        extent = self._sealed(first)
        if extent is not None and first + count <= extent.stop:
            rows = self._map(extent).rows((first - extent.first) * self._rows, count * self._rows)
            return rows.reshape(count, *self._shape)
        out = np.empty((count, *self._shape), self._stored.dtype)
        self._fill(first, out)
        return out

    def _fill(self, first: int, out: np.ndarray) -> None:
        """Fill `out` with consecutive nodes."""
        done = 0
        while done < len(out):
            done += self._copy_from(first + done, out[done:])

    def _copy_from(self, index: int, out: np.ndarray) -> int:
        """Fill `out` from node `index` on as far as one segment or run reaches; returns how many nodes."""
        for attempt in range(2):
            extent = self._sealed(index)
            if extent is not None:
                size = min(len(out), extent.stop - index)
                rows = self._map(extent).rows((index - extent.first) * self._rows, size * self._rows)
                out[:size] = rows.reshape(size, *self._shape)
                return size
            run = self._places.run(self._level, index)
            if run is not None:
                size = min(len(out), run.first + run.count - index)
                start = (index - run.first) * self._shape[0]
                rows = run.arrays[self._stored.name][start : start + size * self._shape[0]]
                out[:size] = rows.reshape(size, *self._shape)
                return size
            # Neither: it was sealed between our look at the extents and at the journal.
            if attempt == 0:
                self.refresh()
        raise CorruptTreeError(
            f"LOD{self._level.lod} node {index} is in the version but neither in a segment nor in the journal of "
            f"context {self._places.version.context!r}. Run `tree verify` and restore from a backup."
        )

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Copy of nodes in any order: `(len(indices), rows_per_node, width)`. Not for tokens, of which a segment may
        leave chunks out."""
        if len(indices) == 0:
            return np.empty((0, *self._shape), self._stored.dtype)
        self._check(int(indices.min()), 1)
        self._check(int(indices.max()), 1)
        extents = self._start_column.searchsorted(indices, side="right")
        sealed = indices < self._stop_column[extents]
        if sealed.all():
            return self._gather_sealed(indices, extents)
        out = np.empty((len(indices), *self._shape), self._stored.dtype)
        if sealed.any():
            out[sealed] = self._gather_sealed(indices[sealed], extents[sealed])
        # The journal is read run by run: consecutive nodes in consecutive places at once.
        rest = np.flatnonzero(~sealed)
        breaks = np.flatnonzero((np.diff(rest) != 1) | (np.diff(indices[rest]) != 1)) + 1
        for run in np.split(rest, breaks):
            self._fill(int(indices[run[0]]), out[run[0] : run[-1] + 1])
        return out

    def _gather_sealed(self, indices: np.ndarray, extents: np.ndarray) -> np.ndarray:
        """Copy of sealed nodes; `extents` are their segments' positions, counted from 1."""
        groups = indices // K
        checked = self._checked[groups]
        if not checked.all():
            self._touch(np.unique(groups[~checked]))
        places = self._origins[extents] + indices * self._stored.node_bytes + groups * CRC_BYTES
        return self._window[places].view(self._stored.dtype).reshape(-1, *self._shape)

    def _touch(self, groups: np.ndarray) -> None:
        """Map and check sibling groups before the first node is gathered from them."""
        try:
            for group in groups.tolist():
                extent = self._extents[bisect.bisect_right(self._starts, group * K) - 1]
                self._map(extent).touch_chunk(group - extent.first // K)
                self._checked[group] = True
        finally:
            # Also those that were mapped to be sliced.
            if self._num_in_window != sum(extent.array is not None for extent in self._extents):
                self._open_window()
