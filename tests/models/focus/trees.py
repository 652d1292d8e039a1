"""Trees in memory of any shape, for tests of focus: short blocks, lagging levels, a tail, blocks of every state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.history import EntryState, History
from storage.contract import DocumentMeta, SpanWrite, TreeReader
from storage.geometry import NO_TOKEN
from storage.memory_tree import MemoryTree
from storage.schema import GISTS, ArraySpec, Encoding

DIM = 4


def make_tree(document_tokens: Sequence[int], *, max_lod: int = 9, tail: int = 0, vectors: int = 1) -> MemoryTree:
    """Documents of so many tokens; node values say level and index, token ids their place in the document."""
    tree = MemoryTree(Encoding("net", "digest", "float32", (ArraySpec(GISTS, DIM, vectors, "float32"),)))
    for number, size in enumerate(document_tokens):
        num_blocks = -(-size // K)
        slots = np.full(num_blocks * K, NO_TOKEN, np.uint32)
        slots[:size] = (np.arange(size) * 7 + number) % 251
        counts = np.full(num_blocks, K, np.uint8)
        counts[-1] = size - (num_blocks - 1) * K
        first = tree.version().num_blocks
        gists = node_values(1, np.arange(first, first + num_blocks), vectors)
        meta = DocumentMeta(f"doc{number}", f"file:///doc{number}")
        tree.append([SpanWrite(meta, 0, slots.reshape(-1, K), counts, {GISTS: gists}, last=True)])
    lod = 2
    while lod <= max_lod and tree.version().num_nodes(lod - 1) >= K:
        count = tree.version().num_nodes(lod - 1) // K
        tree.put_nodes(lod, 0, {GISTS: node_values(lod, np.arange(count), vectors)})
        lod += 1
    if tail:
        tree.append_tail(DocumentMeta("open", "file:///open"), 0, np.arange(tail, dtype=np.uint32))
    return tree


def node_values(lod: int, indices: np.ndarray, vectors: int) -> np.ndarray:
    """`(len(indices) * vectors, DIM)`: lod, index, vector, 1."""
    values = np.ones((len(indices), vectors, DIM), np.float32)
    values[..., 0] = lod
    values[..., 1] = np.asarray(indices)[:, None]
    values[..., 2] = np.arange(vectors)
    return values.reshape(-1, DIM)


class StatedReader:
    """A reader whose tree says what there is of its blocks."""

    def __init__(self, reader: TreeReader, states: np.ndarray) -> None:
        self._reader = reader
        self._states = states

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        return self._states[first_block : first_block + num_blocks]


def with_states(reader: TreeReader, runs: Mapping[EntryState, Sequence[int]]) -> TreeReader:
    """A reader some of whose blocks are not whole."""
    states = np.zeros(reader.version.num_blocks, np.int8)
    for state, blocks in runs.items():
        states[np.asarray(blocks, np.int64)] = state
    return cast(TreeReader, StatedReader(reader, states))


@st.composite
def readers(draw: st.DrawFn, max_blocks: int = 3000) -> tuple[TreeReader, int]:
    """A pinned tree of random documents and depth, and its vectors a node."""
    lengths = draw(st.lists(st.integers(1, 40 * K), min_size=0, max_size=12))
    # One long document at a random place makes trees deep without many draws.
    long = draw(st.integers(0, max_blocks)) * K + draw(st.integers(0, K - 1))
    if long:
        lengths.insert(draw(st.integers(0, len(lengths))), long)
    vectors = draw(st.sampled_from([1, 2]))
    tree = make_tree(lengths, max_lod=draw(st.integers(1, 4)), tail=draw(st.integers(0, 40)), vectors=vectors)
    return tree.reader(), vectors


@st.composite
def block_states(draw: st.DrawFn, num_blocks: int) -> np.ndarray:
    """Runs of every state, single blocks and whole nodes of LOD2 and above among them."""
    states = np.zeros(num_blocks, np.int8)
    block = st.integers(0, max(0, num_blocks - 1))
    run = st.tuples(block, st.one_of(st.integers(1, 3), block))
    nodes = st.tuples(block.map(lambda first: first // K * K), st.sampled_from([K, 2 * K, K * K]))
    for first, length in draw(st.lists(st.one_of(run, nodes), max_size=6)):
        states[first : first + length] = draw(st.sampled_from(EntryState))
    return states


@st.composite
def histories(draw: st.DrawFn, max_blocks: int = 3000) -> tuple[TreeReader, History]:
    """A part of a random tree, all whole or with blocks of every state."""
    reader, vectors = draw(readers(max_blocks))
    num_blocks = reader.version.num_blocks
    if draw(st.booleans()):
        reader = cast(TreeReader, StatedReader(reader, draw(block_states(num_blocks))))
    if draw(st.booleans()):
        return reader, History.of(reader, vectors_per_node=vectors)
    first = draw(st.integers(0, num_blocks))
    stop = draw(st.integers(first, num_blocks))
    return reader, History.of(reader, first, stop, vectors_per_node=vectors)
