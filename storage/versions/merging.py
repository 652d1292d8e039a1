"""Documents of one version appended to another branch: what a merge does where both branches have gone on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError
from storage.contract import DocumentInfo, SpanWrite, Version
from storage.tree import catalogue
from storage.tree.documents import key_digest
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter

REMOVE = "remove"
"""In the audit log: documents were taken out of a branch."""

MERGE_BLOCKS = 4096
"""Blocks of whole documents that a merge appends in one commit."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge did."""

    version: Version
    fast_forward: bool
    documents: int
    blocks: int
    skipped_documents: int = 0
    """They were on the branch already."""
    removed_documents: int = 0
    """They were taken out of the branch before, and stay out."""


def append_branch(writer: ContextWriter, source: str, reader: ContextReader, message: str) -> MergeResult:
    """Append the documents that began behind the fork of two branches; see `Branching.merge`.

    Args:
        writer: on the branch to append to; its lock is not held.
        source: name of the other branch.
        reader: of its newest version.
        message: kept with the versions this makes; empty: what is merged.

    Raises:
        BranchConflictError: see `Branching.merge`; nothing was written.
    """
    plan = _plan(writer, source, reader)
    message = message or f"merge {source} at version {reader.version.seq}"
    blocks = append_documents(writer, reader, plan.new, f"merge {source}", message)
    with writer.commit() as db:
        writer.audit(db, "merge", {"branch": source, "head": reader.version.seq, "blocks": blocks})
    return MergeResult(writer.version(), False, len(plan.new), blocks, plan.num_there, plan.num_removed)


def append_documents(
    writer: ContextWriter, reader: ContextReader, documents: Sequence[DocumentInfo], request_id: str, message: str
) -> int:
    """Append documents of another version with the gists they have, in commits of at most `MERGE_BLOCKS` blocks or
    one document, and seal behind them. Returns how many blocks that were.

    Not to be called with the writer's lock held.
    """
    blocks = 0
    for batch in _batches(documents):
        spans = [_span_of(reader, document) for document in batch]
        blocks += writer.append(spans, request_id, message).new_blocks
        if batch[-1].state == "cut":
            writer.close_document(batch[-1].meta.key)
        writer.flush()
    return blocks


def documents_behind(reader: ContextReader, block: int) -> list[DocumentInfo]:
    """Documents with blocks behind a fork."""
    return [d for d in reader.documents() if d.first_block + d.num_blocks > block]


@dataclass(frozen=True)
class _Plan:
    new: list[DocumentInfo]
    num_there: int
    num_removed: int


def _plan(writer: ContextWriter, source: str, reader: ContextReader) -> _Plan:
    """The documents to append, checked before the first is."""
    shared = min(reader.lineage.shared_blocks(writer.lineage), reader.version.num_blocks, writer.version().num_blocks)
    into = writer.version().branch
    if reader.encoding_id != writer.encoding_id:
        raise BranchConflictError(
            f"branch {source!r} has gists of {reader.version.encoding.gistnet_id}, {into!r} of "
            f"{writer.encoding.gistnet_id}; rebuild one of them with `tree rebuild-gists`"
        )
    growing = writer.open_document()
    if growing is not None:
        raise BranchConflictError(f"document {growing.key!r} is still open on {into!r}; end it, then merge")
    with writer.reader() as mine:
        cut = {(d.meta.key, d.num_tokens) for d in documents_behind(mine, shared) if d.state == "cut"}
    removed = _removed_keys(writer)
    new, num_there, num_removed = [], 0, 0
    for document in documents_behind(reader, shared):
        key = document.meta.key
        there = writer.document(key)
        if there is None and key_digest(key) in removed:
            num_removed += 1
            continue
        if document.first_block < shared:
            raise BranchConflictError(
                f"document {key!r} goes on across the fork at block {shared}, and {into!r} has gone on as well: "
                f"its blocks have no place there. Keep the branch, or discard it."
            )
        if document.state == "open":
            raise BranchConflictError(f"document {key!r} is still open on {source!r}; end it, then merge")
        if (key, document.num_tokens) in cut if document.state == "cut" else there is not None:
            num_there += 1
        else:
            new.append(document)
        if there is not None and (document.state == "cut" or there.num_tokens != document.num_tokens):
            raise BranchConflictError(
                f"document {key!r} has {there.num_tokens} tokens on {into!r} and {document.num_tokens} on {source!r}"
            )
    return _Plan(new, num_there, num_removed)


def _removed_keys(writer: ContextWriter) -> set[str]:
    """Digests of documents that were taken out of the writer's branch, in all of its history."""
    history = {branch.branch_id for branch in writer.lineage.branches}
    found: set[str] = set()
    with writer.reading() as db:
        for detail, is_sound in db.execute(
            f"SELECT detail, {catalogue.sound('audit', 'audit')} FROM audit WHERE action = ?", (REMOVE,)
        ):
            catalogue.require_sound(is_sound, "a removal in the audit log")
            line = json.loads(detail)
            # Older lines do not say of which branch, and which documents.
            if line.get("branch_id") in history:
                found.update(line["keys"])
    return found


def _batches(documents: Sequence[DocumentInfo]) -> Iterator[list[DocumentInfo]]:
    batch: list[DocumentInfo] = []
    for document in documents:
        if batch and sum(d.num_blocks for d in batch) + document.num_blocks > MERGE_BLOCKS:
            yield batch
            batch = []
        batch.append(document)
        if document.state == "cut":
            # It is ended by a commit of its own, and nothing may follow it before.
            yield batch
            batch = []
    if batch:
        yield batch


def _span_of(reader: ContextReader, document: DocumentInfo) -> SpanWrite:
    first, count = document.first_block, document.num_blocks
    # Tokens of pruned blocks come along for as long as they are kept.
    blocks = reader.stored_arrays(0, first, count)
    return SpanWrite(
        document.meta,
        0,
        blocks["tokens"].reshape(count, K),
        blocks["num_tokens"].reshape(count),
        reader.stored_arrays(1, first, count),
        last=document.state == "complete",
        pruned=reader.pruned_spans(first, count),
    )
