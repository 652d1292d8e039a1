"""What a reader yields: a document, or an item that could not become one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

QuarantineReason = Literal[
    "binary",  # NUL bytes, or mostly control characters
    "empty",  # no bytes, or only white space
    "malformed",  # not the JSON or Parquet it claims to be
    "missing_column",  # a row without the text or uri it should have, or with null there
    "not_text",  # a number, list, … where text should be; a pipe, socket or device where a file should be
    "oversized",  # longer than corpus.max_document_bytes
    "undecodable",  # bytes that are not text of any encoding the reader knows
    "unreadable",  # the operating system refused: permission, I/O error, dangling link
]


@dataclass(frozen=True, slots=True)
class Document:
    """A source text with its provenance."""

    uri: str
    """Where it came from, relative to the path given, so that it is the same on every machine."""
    text: str
    """Decoded, without a byte-order mark; line ends are kept as they are."""
    content_sha256: str
    """Hex digest of the raw bytes: the file's, or a row's text as UTF-8."""
    size_bytes: int
    """Length of the raw bytes."""
    modified_at: float | None = None
    """When the file was last modified, in unix seconds; None where nobody knows."""
    tags: tuple[str, ...] = ()
    """Tags given to every document of this corpus."""

    @classmethod
    def from_raw(
        cls, uri: str, text: str, raw: bytes, modified_at: float | None = None, tags: tuple[str, ...] = ()
    ) -> Document:
        """The document of `text`, decoded from `raw`, the bytes that are hashed and counted."""
        return cls(uri, text, hashlib.sha256(raw).hexdigest(), len(raw), modified_at, tags)

    @property
    def key(self) -> str:
        """Identity for idempotent ingest: the same text under the same uri is the same document."""
        return f"{self.uri}@{self.content_sha256[:16]}"


@dataclass(frozen=True, slots=True)
class QuarantinedItem:
    """A file or row that was set aside; reading went on."""

    uri: str
    """The file, or `<file>#<position>` of the row."""
    reason: QuarantineReason
    detail: str
    """What was found, in a few words."""
    size_bytes: int
    """Length of the raw bytes, 0 where unknown."""


CorpusItem = Document | QuarantinedItem
