"""Documents whose every token and gist follows from their name, and trees to put them in."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistDtype
from storage.contract import DocumentMeta, SpanWrite, TreeReader, TreeWriter
from storage.geometry import NO_TOKEN, complete_nodes, deepest_lod
from storage.schema import ArraySpec, Encoding, TreeIdentity
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED
from storage.tree.writer import ContextWriter

IDENTITY = TreeIdentity("tiny-lm", "sha256:base", "sha256:tokenizer")
CONTEXT = "ctx"
VOCABULARY = 50_000


def encoding_of(dtype: GistDtype = "float32", width: int = 4, rows: int = 1, *, key_width: int = 0) -> Encoding:
    """One array `gists`, and with `key_width` a second one `keys`."""
    arrays = [ArraySpec("gists", width, rows, dtype)]
    if key_width:
        arrays.append(ArraySpec("keys", key_width, 1, dtype))
    return Encoding("gistnet", f"sha256:{dtype}-{width}-{rows}", "float32", tuple(arrays))


def vectors(seed: int, lod: int, nodes: np.ndarray, spec: ArraySpec) -> torch.Tensor:
    """`(len(nodes) * rows, width)` float32 that follow from their place alone, exact in float16 and bfloat16."""
    salt = zlib.crc32(f"{seed}/{lod}/{spec.name}".encode())
    row, column = np.ogrid[: spec.rows_per_node, : spec.width]
    mixed = nodes[:, None, None].astype(np.int64) * 7919 + row * 104_729 + column * 1_299_709 + salt
    mixed = (mixed ^ (mixed >> 7)) * 48_271 % 2_147_483_647
    # Seven bits of mantissa are what bfloat16 keeps.
    values = (mixed % 255 - 127).astype(np.float32) / 64
    return torch.from_numpy(values.reshape(len(nodes) * spec.rows_per_node, spec.width))


@dataclass(frozen=True)
class Text:
    """A document of `num_tokens` tokens."""

    key: str
    num_tokens: int
    size_bytes: int = 0
    """Of the whole text, where this is only the part that is stored."""

    @property
    def seed(self) -> int:
        return zlib.crc32(self.key.encode())

    @property
    def meta(self) -> DocumentMeta:
        return DocumentMeta(
            self.key, f"file:///{self.key}", f"sha-{self.key}", self.size_bytes or self.num_tokens, 12.5, ("a",)
        )

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // K)

    def tokens(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `[start, stop)`."""
        positions = np.arange(start, self.num_tokens if stop is None else stop, dtype=np.int64)
        return ((positions * 2_654_435_761 + self.seed) % VOCABULARY).astype(np.uint32)

    def packed(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `(n, 32)` and counts `(n,)` of blocks `[first, stop)`."""
        flat = self.tokens(first * K, min(stop * K, self.num_tokens))
        padded = np.full((stop - first) * K, NO_TOKEN, np.uint32)
        padded[: len(flat)] = flat
        counts = np.minimum(self.num_tokens - np.arange(first, stop) * K, K).astype(np.uint8)
        return padded.reshape(-1, K), counts

    def gists(self, first: int, stop: int, spec: ArraySpec) -> torch.Tensor:
        """Vectors of blocks `[first, stop)`: `((stop - first) * rows, width)`."""
        return vectors(self.seed, 1, np.arange(first, stop), spec)

    def span(self, encoding: Encoding, first: int = 0, stop: int | None = None, *, ends: bool = True) -> SpanWrite:
        """Blocks `[first, stop)`; the last one ends the document unless `ends` is False."""
        stop = self.num_blocks if stop is None else stop
        tokens, counts = self.packed(first, stop)
        arrays = {spec.name: self.gists(first, stop, spec) for spec in encoding.arrays}
        return SpanWrite(self.meta, first, tokens, counts, arrays, last=ends and stop == self.num_blocks)


def nodes_of(encoding: Encoding, lod: int, first: int, stop: int) -> dict[str, torch.Tensor]:
    """Arrays of upper nodes `[first, stop)`."""
    return {spec.name: vectors(0, lod, np.arange(first, stop), spec) for spec in encoding.arrays}


def follow(tree: TreeWriter, encoding: Encoding) -> None:
    """Put every upper node whose children are complete, as the follower of a store does."""
    lod = 2
    while lod <= deepest_lod(tree.version().num_blocks):
        have = tree.version().num_nodes(lod)
        stop = complete_nodes(lod, tree.version().num_blocks)
        if stop > have:
            tree.put_nodes(lod, have, nodes_of(encoding, lod, have, stop))
        lod += 1


def put(tree: TreeWriter, *spans: SpanWrite) -> tuple[int, int]:
    """Append and make durable; `(new, skipped)` blocks."""
    ack = tree.append(spans)
    return ack.new_blocks + tree.flush().new_blocks, ack.skipped_blocks


def new_store(root: Path, encoding: Encoding) -> Store:
    """A store with one empty context."""
    store = Store(root, create=True)
    store.create_context(CONTEXT, IDENTITY, encoding)
    return store


def open_context(root: Path, **options) -> ContextWriter:
    """The context's writer, with segments of 32 blocks unless told otherwise."""
    return ContextWriter(root / CONTEXT, CONTEXT, **{"segment_super_blocks": 1, **options})


def rows(writer: ContextWriter, statement: str, *parameters: object) -> list[tuple]:
    """What the writer's catalogue answers."""
    with writer.reading() as db:
        return db.execute(statement, parameters).fetchall()


def assert_holds(
    reader: TreeReader,
    texts: Sequence[Text],
    encoding: Encoding,
    *,
    exact: bool = True,
    states: np.ndarray | None = None,
) -> None:
    """The reader's timeline is these documents, one after the other: tokens, counts, prefix sums, places and gists.

    With `states`, of every block, those of the pruned ones have no tokens.
    """
    num_blocks = sum(text.num_blocks for text in texts)
    assert reader.version.num_blocks == num_blocks
    assert reader.version.num_tokens == sum(text.num_tokens for text in texts)
    found = reader.documents()
    assert [(d.meta, d.num_blocks, d.num_tokens) for d in found] == [
        (text.meta, text.num_blocks, text.num_tokens) for text in texts
    ]
    if num_blocks == 0:
        return
    tokens, counts = reader.tokens(0, num_blocks)
    wanted_tokens, wanted_counts = map(np.concatenate, zip(*(t.packed(0, t.num_blocks) for t in texts), strict=True))
    before = reader.tokens_before(np.arange(num_blocks + 1))
    np.testing.assert_array_equal(before, np.concatenate([[0], np.cumsum(wanted_counts, dtype=np.int64)]))
    if states is not None:
        assert isinstance(reader, ContextReader)
        np.testing.assert_array_equal(reader.block_states(0, num_blocks), states)
        pruned = np.isin(states, PRUNED)
        wanted_tokens[pruned], wanted_counts[pruned] = NO_TOKEN, 0
    np.testing.assert_array_equal(tokens, wanted_tokens)
    np.testing.assert_array_equal(counts, wanted_counts)
    for spec in encoding.arrays:
        wanted = torch.cat([text.gists(0, text.num_blocks, spec) for text in texts])
        wanted = wanted.reshape(num_blocks, spec.rows_per_node, spec.width)
        read = reader.read(spec.name, 1, np.arange(num_blocks))
        if exact:
            assert torch.equal(read.float(), wanted)
        else:
            assert float(mean_cosine_loss(read, wanted)) < 1e-3


def mean_cosine_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos over all vectors."""
    return 1 - torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1).mean()


def read_everything(reader: TreeReader, encoding: Encoding) -> Mapping[str, np.ndarray]:
    """Tokens, counts, prefix sums and every array of every level."""
    version = reader.version
    tokens, counts = reader.tokens(0, version.num_blocks)
    found = {"tokens": tokens, "counts": counts, "before": reader.tokens_before(np.arange(version.num_blocks + 1))}
    for lod in range(1, version.max_lod + 1):
        for spec in encoding.arrays:
            read = reader.read(spec.name, lod, np.arange(version.num_nodes(lod)))
            found[f"lod{lod}/{spec.name}"] = read.float().numpy()
    return found
