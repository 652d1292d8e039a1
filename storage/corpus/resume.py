"""A corpus in another order: the document that an interrupted ingest left half stored comes first.

A tree has one growing document. What sorts before it and is new since could not begin, so what was begun ends first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from storage.contract import DocumentMeta
from storage.corpus.document import CorpusItem, Document
from storage.corpus.shard import Part, ReadOptions, Shard
from storage.corpus.splits import SplitPart
from storage.corpus.text_file import TextFilePart

if TYPE_CHECKING:
    from storage.corpus.source import CorpusSource


@dataclass(frozen=True, slots=True)
class Selection:
    """Another part's one document, or all but that."""

    part: Part
    key: str
    only: bool

    @property
    def estimated_bytes(self) -> int:
        return self.part.estimated_bytes

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the document, if it is there yet; or all the others, and quarantined items."""
        for item in self.part.read(options):
            is_it = isinstance(item, Document) and item.key == self.key
            if is_it == self.only:
                yield item
            if is_it and self.only:
                return


class ResumedCorpus:
    """Another corpus with one document moved to its beginning. See `storage.corpus.source.CorpusSource`."""

    def __init__(self, source: CorpusSource, first: Selection, options: ReadOptions) -> None:
        """Of a document that is in `source`, in `first`."""
        self._source = source
        self._first = first
        self._options = options

    @property
    def num_files(self) -> int:
        return self._source.num_files

    @property
    def estimated_bytes(self) -> int | None:
        return self._source.estimated_bytes

    def shards(self) -> Iterator[Shard]:
        yield Shard((self._first,), self._options)
        for shard in self._source.shards():
            if self._first.part in shard.parts:
                rest = (replace(self._first, only=False) if part == self._first.part else part for part in shard.parts)
                yield Shard(tuple(rest), shard.options)
            else:
                yield shard

    def digest(self) -> str:
        return hashlib.sha256(f"{self._first.key}\0{self._source.digest()}".encode()).hexdigest()

    def describe(self) -> str:
        return f"{self._source.describe()}, {self._first.key} first"


def interrupted_first(source: CorpusSource, document: DocumentMeta) -> CorpusSource:
    """The corpus with a half-stored document first; as it is when the document is not in it any more.

    Costs reading the corpus up to the document; of text files only those of its name.
    """
    for shard in source.shards():
        for part in shard.parts:
            only = Selection(part, document.key, only=True)
            if _may_hold(part, document.uri) and any(only.read(shard.options)):
                return ResumedCorpus(source, only, shard.options)
    return source


def _may_hold(part: Part, uri: str) -> bool:
    while isinstance(part, SplitPart):
        part = part.part
    return not isinstance(part, TextFilePart) or part.file.uri == uri
