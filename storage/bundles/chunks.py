"""Nodes as safetensors members of bounded size, whose names, headers and sizes follow from the manifest's numbers.

Because they follow, nothing of a chunk has to be believed: a reader knows every size before it reads, and compares the
header instead of interpreting it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from storage.bundles.manifest import Manifest
from storage.schema import Encoding, StoredArray
from storage.tree.journal import BLOCK_LAYOUT

MAX_CHUNK_NODES = 8192
MAX_CHUNK_BYTES = 32 * 2**20
"""Of a chunk's arrays LOD1 and up: what a reader or writer holds in memory, with the tokens and a copy."""

_DTYPES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "int8": "I8", "uint8": "U8", "uint32": "U32"}
_BLOCK_ARRAYS = tuple(stored for stored in BLOCK_LAYOUT if stored.name != "tokens_before")


@dataclass(frozen=True)
class Chunk:
    """Consecutive nodes of one level; LOD1 nodes come with their blocks' tokens."""

    encoding: Encoding
    lod: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """Of the member."""
        return f"lod{self.lod}-{self.first:010d}.safetensors"

    @property
    def stop(self) -> int:
        """The node behind the last one."""
        return self.first + self.count

    @cached_property
    def _arrays(self) -> list[tuple[int, StoredArray]]:
        """`(lod, array)` in the order of the file: wide numbers first, so that all are aligned."""
        arrays = [(self.lod, stored) for stored in self.encoding.stored()]
        if self.lod == 1:
            arrays += [(0, stored) for stored in _BLOCK_ARRAYS]
        return sorted(arrays, key=lambda pair: (-np.dtype(pair[1].dtype).itemsize, pair[0], pair[1].name))

    @cached_property
    def header(self) -> bytes:
        """What a safetensors file of these arrays begins with."""
        body: dict[str, object] = {}
        at = 0
        for lod, stored in self._arrays:
            stop = at + self.count * stored.node_bytes
            body[f"lod{lod}/{stored.name}"] = {
                "dtype": _DTYPES[stored.logical_dtype],
                "shape": [self.count * stored.rows_per_node, stored.width],
                "data_offsets": [at, stop],
            }
            at = stop
        text = json.dumps(body, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Of the member."""
        return len(self.header) + self.count * sum(stored.node_bytes for _, stored in self._arrays)

    def pieces(self, levels: Mapping[int, Mapping[str, np.ndarray]]) -> Iterator[bytes | memoryview]:
        """The member's bytes, given stored arrays by LOD and name (`ContextReader.stored_arrays`)."""
        yield self.header
        for lod, stored in self._arrays:
            array = np.ascontiguousarray(levels[lod][stored.name], stored.dtype)
            assert array.nbytes == self.count * stored.node_bytes
            yield array.reshape(-1).view(np.uint8).data

    def arrays(self, data: bytes) -> dict[int, dict[str, np.ndarray]] | None:
        """Inverse of `pieces`: views of `(count * rows_per_node, width)`; None when the header is another."""
        if not data.startswith(self.header) or len(data) != self.num_bytes:
            return None
        levels: dict[int, dict[str, np.ndarray]] = {lod: {} for lod, _ in self._arrays}
        at = len(self.header)
        for lod, stored in self._arrays:
            size = self.count * stored.rows_per_node * stored.width
            values = np.frombuffer(data, stored.dtype, size, at)
            levels[lod][stored.name] = values.reshape(-1, stored.width)
            at += values.nbytes
        return levels


def nodes_per_chunk(encoding: Encoding) -> int:
    """Nodes of every chunk but a level's last: a multiple of 32 that keeps the arrays within `MAX_CHUNK_BYTES`."""
    fitting = MAX_CHUNK_BYTES // encoding.node_bytes // K * K
    return max(K, min(MAX_CHUNK_NODES, fitting))


def chunks(encoding: Encoding, num_blocks: int, upper_nodes: tuple[int, ...]) -> Iterator[Chunk]:
    """All chunks of a bundle in the order of the file: level by level, from LOD1 on."""
    size = nodes_per_chunk(encoding)
    for lod, num_nodes in enumerate((num_blocks, *upper_nodes), start=1):
        for first in range(0, num_nodes, size):
            yield Chunk(encoding, lod, first, min(size, num_nodes - first))


def num_chunks(manifest: Manifest) -> int:
    """How many chunks a manifest's numbers mean; they may be absurd."""
    size = nodes_per_chunk(manifest.encoding)
    return sum(-(-num_nodes // size) for num_nodes in (manifest.num_blocks, *manifest.upper_nodes))
