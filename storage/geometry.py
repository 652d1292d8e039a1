"""Arithmetic of the tree: slots, blocks, nodes.

Node `(lod, index)` covers slots `[index * 32**lod, (index + 1) * 32**lod)`. LOD0 nodes are slots, LOD1 nodes are
blocks, LOD2 nodes are super-blocks. Everything here counts slots; real tokens are counted by the prefix sum that
is stored with every block, because a document's last block may be short.
"""

from __future__ import annotations

from cluster.config import TOKENS_PER_BLOCK as K

NO_TOKEN = 0xFFFFFFFF
"""Content of a slot that holds nothing."""


def node_slots(lod: int) -> int:
    """Slots a node of this level covers."""
    return K**lod


def node_blocks(lod: int) -> int:
    """Blocks a node of level `lod >= 1` covers."""
    return K ** (lod - 1)


def node_block_range(lod: int, index: int) -> tuple[int, int]:
    """Blocks `[first, stop)` of node `(lod, index)`; at LOD0 the block that holds the slot."""
    if lod == 0:
        return index // K, index // K + 1
    size = node_blocks(lod)
    return index * size, (index + 1) * size


def complete_nodes(lod: int, num_blocks: int) -> int:
    """How many nodes of level `lod >= 1` are wholly covered by `num_blocks` blocks."""
    return num_blocks // node_blocks(lod)


def deepest_lod(num_blocks: int) -> int:
    """The highest level with at least one complete node; 0 for an empty timeline."""
    lod = 0
    while num_blocks >= node_blocks(lod + 1):
        lod += 1
    return lod


def split_aligned(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Cut `[first, first + count)` at multiples of `size`: a list of `(first, count)`."""
    parts = []
    while count > 0:
        take = min(count, size - first % size)
        parts.append((first, take))
        first, count = first + take, count - take
    return parts
