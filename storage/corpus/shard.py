"""Units of reading: a part reads one piece of one file, a shard is the parts one task reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.config import CorpusConfig
from storage.corpus.document import CorpusItem, QuarantinedItem


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What of the configuration a reader needs on a worker."""

    text_column: str = "text"
    uri_column: str = ""
    max_document_bytes: int = 64 * 2**20
    tags: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: CorpusConfig) -> ReadOptions:
        return cls(config.text_column, config.uri_column, config.max_document_bytes, tuple(config.tags))


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """How a corpus is cut. Fewer, larger shards cost a task less; smaller ones spread better over workers."""

    group_bytes: int = 4 * 2**20
    """Small files share a shard up to this many bytes."""
    group_files: int = 256
    """Small files share a shard up to this many."""
    range_bytes: int = 16 * 2**20
    """A JSON Lines range or a run of Parquet row groups takes about this many bytes of text."""


def refuse_size(uri: str, size_bytes: int, options: ReadOptions) -> QuarantinedItem | None:
    """Set aside what is longer than `options.max_document_bytes`."""
    if size_bytes <= options.max_document_bytes:
        return None
    detail = f"corpus.max_document_bytes is {options.max_document_bytes}"
    return QuarantinedItem(uri, "oversized", detail, size_bytes)


class Part(Protocol):
    """A piece of one file (or a remote table) that can be read on its own. Picklable."""

    @property
    def estimated_bytes(self) -> int: ...

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """A picklable unit of work. Reading all shards in order yields the corpus in order."""

    parts: tuple[Part, ...]
    options: ReadOptions

    @property
    def estimated_bytes(self) -> int:
        """Bytes of raw text this shard holds, about."""
        return sum(part.estimated_bytes for part in self.parts)

    def read(self) -> Iterator[CorpusItem]:
        """Yield documents and quarantined items in corpus order, holding one document at a time."""
        for part in self.parts:
            yield from part.read(self.options)


@dataclass(frozen=True, slots=True)
class RefusedPart:
    """A file that was already set aside when the corpus was listed."""

    item: QuarantinedItem

    @property
    def estimated_bytes(self) -> int:
        return 0

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        yield self.item


def group_parts(parts: Iterable[Part], options: ReadOptions, limits: ShardLimits) -> Iterator[Shard]:
    """Put consecutive parts together until a shard is full; a large part gets a shard of its own."""
    group: list[Part] = []
    num_bytes = 0
    for part in parts:
        full = num_bytes + part.estimated_bytes > limits.group_bytes or len(group) >= limits.group_files
        if group and full:
            yield Shard(tuple(group), options)
            group, num_bytes = [], 0
        group.append(part)
        num_bytes += part.estimated_bytes
    if group:
        yield Shard(tuple(group), options)
