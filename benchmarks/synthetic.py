"""Contexts of any size in seconds: tokens and gists drawn at random, for benchmarks of storage alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import DocumentMeta, SpanWrite, TreeWriter
from storage.geometry import complete_nodes, deepest_lod
from storage.schema import ArraySpec, Encoding, TreeIdentity
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter
from storage.tree.writer import ContextWriter

DIM = 576
"""Width of SmolLM2-135M, and of its gists and keys."""

VOCABULARY = 49_152
IDENTITY = TreeIdentity("synthetic", "sha256:synthetic", "sha256:synthetic")

SUPER_BLOCKS_PER_DOCUMENT = 8
NUM_PATTERNS = 64
"""Different super-blocks; a larger context repeats them, since storage does not look at values."""

NODES_AT_A_TIME = 4096


def encoding(*, keys: bool) -> Encoding:
    """float16 gists, with or without keys of the same width."""
    names = ("gists", "keys") if keys else ("gists",)
    return Encoding("synthetic", f"sha256:{len(names)}", "float32", tuple(ArraySpec(name, DIM) for name in names))


class SuperBlocks:
    """An endless stream of super-blocks, as spans of documents of 8,192 tokens."""

    def __init__(self, level: Encoding, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (NUM_PATTERNS, BLOCKS_PER_SUPER_BLOCK)
        self._tokens = rng.integers(VOCABULARY, size=(*shape, K), dtype=np.uint32)
        self._arrays = {
            spec.name: rng.standard_normal((*shape, spec.width), np.float32).astype(np.float16) for spec in level.arrays
        }
        self._counts = np.full(BLOCKS_PER_SUPER_BLOCK, K, np.uint8)
        self._name = f"seed{seed}"
        self._number = 0

    def __iter__(self) -> Iterator[SpanWrite]:
        return self

    def __next__(self) -> SpanWrite:
        document, part = divmod(self._number, SUPER_BLOCKS_PER_DOCUMENT)
        pattern = self._number % NUM_PATTERNS
        self._number += 1
        name = f"{self._name}-{document:06d}"
        return SpanWrite(
            DocumentMeta(name, f"file:///{name}", f"sha-{name}", SUPER_BLOCKS_PER_DOCUMENT * SLOTS_PER_SUPER_BLOCK),
            part * BLOCKS_PER_SUPER_BLOCK,
            self._tokens[pattern],
            self._counts,
            {array: values[pattern] for array, values in self._arrays.items()},
            last=part == SUPER_BLOCKS_PER_DOCUMENT - 1,
        )


def build_context(
    root: Path, name: str, level: Encoding, num_super_blocks: int, seed: int = 0
) -> tuple[ContextWriter, SuperBlocks]:
    """A context with every level complete, its open writer, and the stream that goes on where it ends."""
    writer = Store(root, create=True).open_writer(name, IDENTITY, level, create=True)
    stream = SuperBlocks(level, seed)
    bulk = BulkWriter(writer)
    remaining = num_super_blocks
    while remaining:
        batch = list(islice(stream, min(remaining, 8)))
        bulk.append(batch)
        remaining -= len(batch)
    bulk.flush()
    put_levels(writer, level)
    writer.flush()
    return writer, stream


def put_levels(writer: TreeWriter, level: Encoding) -> None:
    """Random nodes for every level above the blocks."""
    rng = np.random.default_rng(1)
    num_blocks = writer.version().num_blocks
    for lod in range(2, deepest_lod(num_blocks) + 1):
        stop = complete_nodes(lod, num_blocks)
        for first in range(0, stop, NODES_AT_A_TIME):
            count = min(NODES_AT_A_TIME, stop - first)
            nodes = {
                spec.name: rng.standard_normal((count, spec.width), np.float32).astype(np.float16)
                for spec in level.arrays
            }
            writer.put_nodes(lod, first, nodes)
