"""What every MegaContext Tree promises, on disk or in memory.

Writers append spans of documents; the tree assigns them their place on the timeline. Every write is idempotent: a
span that is stored already is skipped, a gap is refused, and an acknowledged write is durable. Levels 2 and up are
put by a follower as their sibling groups complete. Readers are pinned to a `Version` and never see half a commit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import InvalidWriteError
from storage.codec import Values
from storage.geometry import NO_TOKEN
from storage.schema import Encoding


@dataclass(frozen=True)
class DocumentMeta:
    """Where a document comes from. `key` identifies it for idempotent writes."""

    key: str
    uri: str
    content_sha256: str = ""
    size_bytes: int = 0
    modified_at: float | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class DocumentInfo:
    """A stored document and its span on the timeline."""

    meta: DocumentMeta
    first_block: int
    num_blocks: int
    num_tokens: int
    state: str
    """`open` (still growing), `complete`, or `cut` (ended early)."""


@dataclass(frozen=True)
class DocumentMark:
    """How far a document is stored: the high-water mark that committed with its data."""

    num_blocks: int
    num_tokens: int
    tail_tokens: int
    state: str


class BlockState(IntEnum):
    """What there is of a block."""

    WHOLE = 0
    GIST_ONLY = 1
    """Its tokens were taken out of the tree by curation; gists of all levels stay."""
    TOMBSTONED = 2
    """The same, and no detail of it is to be shown: a Working Context represents it as coarsely as it can."""
    SPECULATIVE = 3
    """Has its tokens, and may be discarded or replaced at its place."""


class PrunedSpan(NamedTuple):
    """Blocks that are not whole."""

    first: int
    num_blocks: int
    state: BlockState
    keep_until: float
    """Unix seconds: when their tokens may be collected."""


@dataclass(frozen=True)
class SpanWrite:
    """Consecutive blocks of one document.

    `tokens` is `(num_blocks, 32)` uint32 with `NO_TOKEN` in unused slots; `num_tokens` is `(num_blocks,)` uint8.
    Only the document's very last block may be short. `arrays` holds the blocks' gists, keys, … by name.
    """

    document: DocumentMeta
    first_block: int
    """Within the document, not on the timeline."""
    tokens: np.ndarray
    num_tokens: np.ndarray
    arrays: Mapping[str, Values]
    last: bool = False
    """The document ends with this span."""
    pruned: tuple[PrunedSpan, ...] = ()
    """Blocks, counted in the span, that are not whole. Where their tokens are gone every slot holds NO_TOKEN; counts
    stay."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the span."""
        return len(self.num_tokens)

    @property
    def total_tokens(self) -> int:
        """Real tokens of the span. Of a sound one, only the last block may be short."""
        return (len(self.num_tokens) - 1) * K + int(self.num_tokens[-1])

    def part(self, start: int, stop: int) -> SpanWrite:
        """Blocks `[start, stop)` of the span as a span of its own."""
        arrays = {
            name: values.reshape(self.num_blocks, -1, values.shape[-1])[start:stop].reshape(-1, values.shape[-1])
            for name, values in self.arrays.items()
        }
        return replace(
            self,
            first_block=self.first_block + start,
            tokens=self.tokens[start:stop],
            num_tokens=self.num_tokens[start:stop],
            arrays=arrays,
            last=self.last and stop == self.num_blocks,
            pruned=_clipped(self.pruned, start, stop),
        )

    def check(self) -> None:
        """Refuse a span that is malformed in itself.

        Raises:
            InvalidWriteError: naming the document and what is wrong.
        """
        where = f"document {self.document.key!r}, block {self.first_block}"
        counts = self.num_tokens
        if self.first_block < 0:
            raise InvalidWriteError(f"{where}: a document begins at block 0")
        if self.tokens.dtype != np.uint32 or self.tokens.shape != (len(counts), K):
            raise InvalidWriteError(
                f"{where}: tokens are {self.tokens.dtype}{self.tokens.shape}, expected uint32({len(counts)}, {K})"
            )
        # Counts are few and bytes: Python's own min and max take a tenth of numpy's time.
        sizes = counts.tobytes()
        if counts.dtype != np.uint8 or not sizes or min(sizes) < 1 or max(sizes) > K:
            raise InvalidWriteError(f"{where}: num_tokens must be uint8 from 1 to {K}, at least one block")
        short = K - sizes[-1]
        if min(sizes[:-1], default=K) != K or (short and not self.last):
            raise InvalidWriteError(f"{where}: only a document's last block may be short")
        # NO_TOKEN is the largest number there is, so one maximum tells that the used slots hold none.
        slots = self.tokens.reshape(-1)
        used = len(slots) - short
        if self.pruned:
            self._check_pruned(where)
        elif slots[:used].max() == NO_TOKEN or (short and slots[used:].min() != NO_TOKEN):
            raise InvalidWriteError(f"{where}: unused slots, and only those, must hold NO_TOKEN")
        for name, values in self.arrays.items():
            num_rows = math.prod(values.shape[:-1])
            if values.ndim < 2 or num_rows == 0 or num_rows % len(counts):
                raise InvalidWriteError(
                    f"{where}: array {name!r} has shape {tuple(values.shape)}, which does not share out to "
                    f"{len(counts)} blocks"
                )

    def _check_pruned(self, where: str) -> None:
        may_be_gone = np.zeros(self.num_blocks, bool)
        for span in self.pruned:
            may_be_gone[span.first : span.first + span.num_blocks] = True
        empty = self.tokens == NO_TOKEN
        gone = empty.all(axis=1)
        unused = np.arange(K) >= self.num_tokens[:, None]
        if (gone & ~may_be_gone).any() or not np.array_equal(empty[~gone], unused[~gone]):
            raise InvalidWriteError(f"{where}: unused slots and pruned blocks, and only those, may hold NO_TOKEN")


def _clipped(spans: tuple[PrunedSpan, ...], start: int, stop: int) -> tuple[PrunedSpan, ...]:
    """The parts of spans in `[start, stop)`, counted from there."""
    cut = [(max(s.first, start), min(s.first + s.num_blocks, stop), s) for s in spans]
    return tuple(s._replace(first=low - start, num_blocks=high - low) for low, high, s in cut if low < high)


@dataclass(frozen=True)
class Version:
    """An immutable committed state of a branch."""

    context: str
    branch: str
    seq: int
    encoding: Encoding
    num_tokens: int
    level_counts: tuple[int, ...]
    """Nodes of LOD1, LOD2, …; LOD1 nodes are blocks."""
    branch_id: int = 0
    """Of the branch whose nodes these are, whatever it is called: a name can go to another branch, this cannot. Two
    versions of one id agree in all that both have."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the timeline."""
        return self.level_counts[0] if self.level_counts else 0

    @property
    def max_lod(self) -> int:
        """The highest level that holds a node; 0 when there is none."""
        return len(self.level_counts)

    def num_nodes(self, lod: int) -> int:
        """Nodes of a level; LOD0 counts slots."""
        if lod == 0:
            return self.num_blocks * K
        return self.level_counts[lod - 1] if lod <= len(self.level_counts) else 0


@dataclass(frozen=True)
class Ack:
    """What a write did, and the version that holds it. Durable when returned, unless `pending_blocks` says so."""

    version: Version
    new_blocks: int = 0
    skipped_blocks: int = 0
    new_nodes: int = 0
    pending_blocks: int = 0
    """Blocks accepted but not durable yet (bulk writers only); `flush` makes them so."""


@dataclass(frozen=True)
class Tail:
    """The open document's tokens that do not fill a block yet, or have no gist yet."""

    document: DocumentMeta
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))


@runtime_checkable
class TreeReader(Protocol):
    """Reads one pinned version."""

    @property
    def version(self) -> Version:
        """The version this reader is pinned to."""
        ...

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks.

        Returns:
            `(num_blocks, 32)` uint32 with `NO_TOKEN` in unused slots, and `(num_blocks,)` uint8 tokens in each row. A
            block that curation pruned has none here, though the timeline counts those it had (`tokens_before`).

        Raises:
            NodeMissingError: blocks outside the version.
            CorruptTreeError: a checksum does not match; names segment and node.
        """
        ...

    def tokens_before(self, blocks: np.ndarray) -> np.ndarray:
        """Real tokens of the timeline before each block: int64, shape of `blocks`; `num_blocks` is allowed too."""
        ...

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Nodes of a level, in the order asked for: `(len(indices), rows_per_node, width)`, a float dtype.

        Raises:
            NodeMissingError: an index outside the version.
            IncompatibleTreeError: no array of that name.
            CorruptTreeError: a checksum does not match.
        """
        ...

    def read_node(self, name: str, lod: int, index: int) -> torch.Tensor:
        """One node: `(rows_per_node, width)`. Errors as `read`."""
        ...

    def read_group(self, name: str, lod: int, group: int) -> torch.Tensor:
        """The siblings `[32 * group, 32 * group + 32)`, fewer at the tip: `(n, rows_per_node, width)`."""
        ...

    def documents(self) -> list[DocumentInfo]:
        """The version's documents in timeline order."""
        ...

    def document_at(self, block: int) -> DocumentInfo:
        """The document a block belongs to.

        Raises:
            NodeMissingError: the block is outside the version.
        """
        ...

    def tail(self) -> Tail | None:
        """The open document's unfilled tail when the version is the newest of its branch; None without one."""
        ...

    def close(self) -> None:
        """Release what the reader holds."""
        ...


@runtime_checkable
class TreeWriter(Protocol):
    """The one writer of a context."""

    def version(self) -> Version:
        """The newest committed version."""
        ...

    def append(self, spans: Sequence[SpanWrite], request_id: str = "") -> Ack:
        """Store spans in order, in one commit. Stored blocks are skipped, also when a span holds both.

        Raises:
            InvalidWriteError: a malformed span; nothing of the call is stored.
            OutOfOrderError: a gap, a second open document, or a complete document that would grow.
            DiskFullError: the disk refused; nothing of the call is stored.
            StaleWriterError: a newer writer has taken over.
        """
        ...

    def append_tail(self, document: DocumentMeta, token_offset: int, tokens: np.ndarray) -> Ack:
        """Make raw tokens of the open document durable before their blocks are full.

        `token_offset` counts the document's tokens; what is stored already is skipped. A later `append` of the
        same tokens as blocks takes them out of the tail.
        """
        ...

    def close_document(self, key: str, *, complete: bool = False) -> Ack:
        """End the open document, so that another may begin.

        With `complete` its blocks must hold all of it. Otherwise it ends early (state `cut`): its tail is dropped,
        and the same key may begin again as a new document.

        Raises:
            OutOfOrderError: it is not the open document, or `complete` would lose a tail.
        """
        ...

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """Store nodes of level `lod >= 2` whose children are complete. Stored ones are skipped; a gap is refused."""
        ...

    def marks(self, keys: Sequence[str]) -> dict[str, DocumentMark]:
        """High-water marks of those documents that are known."""
        ...

    def open_document(self) -> DocumentMeta | None:
        """The document that is still growing."""
        ...

    def flush(self) -> Ack:
        """Make everything accepted durable."""
        ...

    def reader(self) -> TreeReader:
        """A reader pinned to the newest version."""
        ...

    def close(self) -> None:
        """Flush, finish background work, give up the writer's place."""
        ...
