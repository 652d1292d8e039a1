"""Rows of the documents table, and the high-water mark that moves with a document's data."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass, field

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import OutOfOrderError
from storage.contract import DocumentInfo, DocumentMark, DocumentMeta, SpanWrite
from storage.geometry import NO_TOKEN
from storage.tree import catalogue
from storage.tree.lineage import Lineage

_COLUMNS = (
    "d.document_id, d.key, d.uri, d.content_sha256, d.size_bytes, d.modified_at, d.tags, d.first_block, d.num_blocks, "
    "d.num_tokens, d.state"
)


def _select(tail: bool, where: str) -> str:
    """Columns as `_document` takes them."""
    tail_columns = f"t.tokens, t.tokens IS NULL OR {catalogue.sound('tails', 't')}" if tail else "NULL, 1"
    joined = " LEFT JOIN tails t ON t.document_id = d.document_id" if tail else ""
    return f"SELECT {_COLUMNS}, {catalogue.sound('documents', 'd')}, {tail_columns} FROM documents d{joined} {where}"


_BEFORE = "d.first_block < coalesce(?, 9223372036854775807)"
# Of those that begin inside the version. One that is open reaches to its end.
_HAS_BLOCKS = "(d.state = 'open' OR d.num_blocks > 0)"


def key_digest(key: str) -> str:
    """Stands for a key in the audit log, which outlives what is erased: SHA-256 in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class OpenDocument:
    """A document as the writer sees it; `tail` holds tokens beyond its blocks."""

    document_id: int | None
    meta: DocumentMeta
    first_block: int
    num_blocks: int = 0
    num_tokens: int = 0
    state: str = "open"
    tail: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))

    def copy(self) -> OpenDocument:
        """A copy to plan on."""
        return OpenDocument(
            self.document_id, self.meta, self.first_block, self.num_blocks, self.num_tokens, self.state, self.tail
        )

    def mark(self) -> DocumentMark:
        """Its high-water mark."""
        return DocumentMark(self.num_blocks, self.num_tokens, len(self.tail), self.state)

    def mark_at(self, num_blocks: int) -> DocumentMark | None:
        """Its high-water mark as it was when the timeline had so many blocks; None if it had none of them then."""
        stored = num_blocks - self.first_block
        if stored >= self.num_blocks:
            return self.mark()
        return DocumentMark(stored, stored * K, 0, "open") if stored > 0 else None

    def grow(self, span: SpanWrite) -> None:
        """Account for a span that follows what is stored; takes its tokens out of the tail.

        Raises:
            OutOfOrderError: the tail holds other tokens than the span, or would be left behind by a last block.
        """
        if len(self.tail):
            tokens = span.tokens[span.tokens != NO_TOKEN]
            overlap = min(len(tokens), len(self.tail))
            if not np.array_equal(tokens[:overlap], self.tail[:overlap]):
                raise OutOfOrderError(
                    f"document {self.meta.key!r}: blocks from {span.first_block} on differ from the stored tail tokens"
                )
            self.tail = self.tail[overlap:]
        if span.last and len(self.tail):
            raise OutOfOrderError(
                f"document {self.meta.key!r} cannot end: {len(self.tail)} tail tokens follow its last block"
            )
        self.num_blocks += span.num_blocks
        self.num_tokens += span.total_tokens
        if span.last:
            self.state = "complete"

    def end(self, *, complete: bool) -> None:
        """End it: as `complete`, or early as `cut` (the tail is dropped and the key is freed).

        Raises:
            OutOfOrderError: tail tokens would be lost by completing it.
        """
        if complete and len(self.tail):
            raise OutOfOrderError(
                f"document {self.meta.key!r} cannot be complete: {len(self.tail)} tail tokens are in no block yet"
            )
        self.state = "complete" if complete else "cut"
        self.tail = self.tail[:0]


def find_document(connection: sqlite3.Connection, lineage: Lineage, key: str, num_blocks: int) -> OpenDocument | None:
    """The document of a key, with its tail; the branch has `num_blocks` blocks."""
    for part in reversed(lineage.document_parts()):
        row = connection.execute(
            _select(True, f"WHERE d.branch_id = ? AND d.key = ? AND {_BEFORE}"),
            (part.branch_id, key, part.stop),
        ).fetchone()
        if row is not None:
            return _document(row, num_blocks)
    return None


def open_document(connection: sqlite3.Connection, branch_id: int, num_blocks: int) -> OpenDocument | None:
    """The document that is still growing, always the newest, of a branch with `num_blocks` blocks."""
    row = connection.execute(
        _select(True, "WHERE d.branch_id = ? ORDER BY d.document_id DESC LIMIT 1"),
        (branch_id,),
    ).fetchone()
    if row is None or row[10] != "open":
        return None
    return _document(row, num_blocks)


def insert_document(db: sqlite3.Connection, branch_id: int, document: OpenDocument) -> int:
    """Add a document's row and tail; returns its id."""
    meta = document.meta
    cursor = db.execute(
        "INSERT INTO documents (branch_id, key, uri, content_sha256, size_bytes, modified_at, tags, first_block, "
        "num_blocks, num_tokens, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            branch_id,
            meta.key,
            meta.uri,
            meta.content_sha256,
            meta.size_bytes,
            meta.modified_at,
            json.dumps(meta.tags),
            document.first_block,
            document.num_blocks,
            document.num_tokens,
            document.state,
        ),
    )
    assert cursor.lastrowid is not None
    if len(document.tail):
        _set_tail(db, branch_id, cursor.lastrowid, document.tail)
    return cursor.lastrowid


def update_document(db: sqlite3.Connection, branch_id: int, document: OpenDocument) -> None:
    """Store a document's tail, and its counts and state once it has ended: until then they follow from the branch."""
    assert document.document_id is not None
    if document.state != "open":
        db.execute(
            "UPDATE documents SET num_blocks = ?, num_tokens = ?, state = ? WHERE document_id = ?",
            (document.num_blocks, document.num_tokens, document.state, document.document_id),
        )
    if document.state == "cut":
        # It keeps its span but not its key: the same text may come again, from its start. (A key that is set, also to
        # what it was, writes a page of the index in every commit.)
        key = document.meta.key + _cut_suffix(document.document_id)
        db.execute("UPDATE documents SET key = ? WHERE document_id = ?", (key, document.document_id))
    _set_tail(db, branch_id, document.document_id, document.tail)


def plain_key(document_id: int, key: str, state: str) -> str:
    """A document's key by the columns of its row: a cut one's is kept apart there."""
    return key.removesuffix(_cut_suffix(document_id)) if state == "cut" else key


def _cut_suffix(document_id: int) -> str:
    return f"#cut{document_id}"


def _set_tail(db: sqlite3.Connection, branch_id: int, document_id: int, tail: np.ndarray) -> None:
    if len(tail):
        db.execute(
            "INSERT INTO tails (branch_id, document_id, tokens) VALUES (?, ?, ?) ON CONFLICT (branch_id) DO UPDATE SET "
            "document_id = excluded.document_id, tokens = excluded.tokens",
            (branch_id, document_id, tail.astype("<u4").tobytes()),
        )
    else:
        db.execute("DELETE FROM tails WHERE branch_id = ?", (branch_id,))


def document_infos(connection: sqlite3.Connection, lineage: Lineage, num_blocks: int) -> list[DocumentInfo]:
    """Documents of a version with `num_blocks` blocks that have any of them, in timeline order."""
    infos = []
    for part in lineage.document_parts():
        stop = num_blocks if part.stop is None else min(part.stop, num_blocks)
        rows = connection.execute(
            _select(False, f"WHERE d.branch_id = ? AND {_BEFORE} AND {_HAS_BLOCKS} ORDER BY d.first_block"),
            (part.branch_id, stop),
        )
        infos += [_info(_document(row, num_blocks)) for row in rows]
    return infos


def document_info_at(
    connection: sqlite3.Connection, lineage: Lineage, num_blocks: int, block: int
) -> DocumentInfo | None:
    """The document whose span holds a block of a version with `num_blocks` blocks."""
    part = next(part for part in reversed(lineage.document_parts()) if part.first <= block)
    row = connection.execute(
        _select(
            False,
            f"WHERE d.branch_id = ? AND d.first_block <= ? AND {_HAS_BLOCKS} ORDER BY d.first_block DESC LIMIT 1",
        ),
        (part.branch_id, block),
    ).fetchone()
    return None if row is None else _info(_document(row, num_blocks))


def _info(document: OpenDocument) -> DocumentInfo:
    return DocumentInfo(document.meta, document.first_block, document.num_blocks, document.num_tokens, document.state)


def _document(row: tuple, stop: int) -> OpenDocument:
    """The document of a row; `stop` is where the branch, or a version of it, ends."""
    meta = DocumentMeta(plain_key(row[0], row[1], row[10]), row[2], row[3], row[4], row[5], tuple(json.loads(row[6])))
    catalogue.require_sound(row[11], f"document {meta.key!r}")
    catalogue.require_sound(row[13], f"the tail of document {meta.key!r}")
    tail = np.frombuffer(row[12], "<u4") if row[12] is not None else np.empty(0, np.uint32)
    first_block, num_blocks, num_tokens, state = row[7:11]
    if state == "open":
        num_blocks = max(stop - first_block, 0)
        num_tokens = num_blocks * K
    return OpenDocument(row[0], meta, first_block, num_blocks, num_tokens, state, tail)
