"""Brings a bundle into a context: checked as a whole first, then appended document by document.

Nothing is remembered of an import but what it stored, so it goes on after any stop and brings nothing twice: a
document of the bundle that the branch has already is left out, one that an interrupted import left open goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BundleError, StorageError
from storage.bundles.reader import BundleReader, Piece, is_end
from storage.contract import DocumentInfo, SpanWrite, Version
from storage.schema import check_same
from storage.store import Store, check_room, estimate_bytes
from storage.tree.documents import OpenDocument
from storage.tree.reader import ContextReader
from storage.tree.writer import MAIN_BRANCH, ContextWriter
from storage.versions.history import History

OnBlocks = Callable[[int, str], None]
"""Is told of every so many blocks, and what was done with them: `checking`, `comparing` or `writing`."""

_REQUEST = "import"


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    version: Version
    new_documents: int
    """Those that an interrupted import had begun are counted by the one that ends them."""
    skipped_documents: int
    """They were on the branch already."""
    new_blocks: int
    new_nodes: int
    """Of LOD2 and above."""
    levels_missing: bool
    """The levels above the blocks are not complete: the next `compact` of the context makes them."""


def import_bundle(
    bundle: BundleReader,
    store: Store,
    context: str,
    *,
    branch: str = MAIN_BRANCH,
    segment_super_blocks: int = 32,
    owner: str = "",
    on_blocks: OnBlocks = lambda _num_blocks, _step: None,
) -> ImportResult:
    """Check all of a bundle, then append its documents to a branch; a context that is not there is made.

    The levels above the blocks come along when the bundle's blocks stand at the beginning of the branch, as they do in
    a new context. Elsewhere other blocks are siblings, and the follower of the next `compact` makes those levels.

    Args:
        bundle: as opened.
        store: where to.
        context: the context, of the same identity and encoding when it is there.
        branch: of the context; a new context has `main` alone.
        segment_super_blocks: see `ContextWriter`.
        owner: see `ContextWriter`.
        on_blocks: progress.

    Raises:
        BundleError: the bundle is damaged or forged, or contradicts the branch; nothing was written.
        IncompatibleTreeError: the context was made by something else; nothing was written.
        DiskFullError: the disk cannot hold it.
        StorageError: no such branch.
        WriterConflictError: another live writer holds the context.
    """
    manifest = bundle.manifest
    _check_target(bundle, store, context, branch)
    bundle.verify(lambda num_blocks: on_blocks(num_blocks, "checking"))
    if not store.has_context(context):
        _check_room(bundle, store, manifest.num_blocks)
    with store.open_writer(
        context,
        manifest.identity,
        manifest.encoding,
        create=True,
        branch=branch,
        segment_super_blocks=segment_super_blocks,
        owner=owner,
    ) as writer:
        there = _compare(bundle, writer, on_blocks)
        _check_room(bundle, store, manifest.num_blocks - there.num_blocks)
        return _write(bundle, writer, there, on_blocks)


def _check_target(bundle: BundleReader, store: Store, context: str, branch: str) -> None:
    """What can be refused before the bundle is read."""
    manifest = bundle.manifest
    if not store.has_context(context):
        if branch != MAIN_BRANCH:
            raise StorageError(f"there is no context {context!r}, and a new one has the branch 'main' alone")
        return
    known = [info.name for info in History(store.folder(context), context).branches()]
    if branch not in known:
        raise StorageError(f"context {context!r} has no branch {branch!r} to append to; it has: {', '.join(known)}")
    identity, encoding = store.identity(context, branch)
    advice = "Import it into a context of its own with --store.context"
    check_same(f"context {context!r}", identity, manifest.identity, advice)
    check_same(f"context {context!r}", encoding, manifest.encoding, advice)


def _check_room(bundle: BundleReader, store: Store, num_blocks: int) -> None:
    if num_blocks:
        need = estimate_bytes(bundle.manifest.encoding, num_blocks * K)
        advice = "Free space, or set --store.root to a larger disk, and run the same command again"
        check_room(store.root, need, f"{num_blocks:,} blocks", advice)


# -- what is there already -------------------------------------------------------------------------------------------


@dataclass
class _There:
    """What the branch has of the bundle."""

    documents: set[int] = field(default_factory=set)
    """First blocks, in the bundle, of the documents that it has wholly."""
    num_blocks: int = 0
    """Of those, and of the one that goes on."""


def _compare(bundle: BundleReader, writer: ContextWriter, on_blocks: OnBlocks) -> _There:
    """Find what the branch has of the bundle, token by token, before anything is written.

    Raises:
        BundleError: a document is another one on the branch, or one that is open there stands in the way.
    """
    there = _There()
    if writer.version().num_blocks == 0 and writer.open_document() is None:
        return there
    with writer.reader() as reader:
        matcher = _Matcher(bundle, writer, reader)
        for pieces in bundle.blocks():
            for document, span in pieces:
                if span.first_block == 0:
                    matcher.begin(document)
                there.num_blocks += matcher.compare(span)
                if is_end(document, span) and matcher.is_whole:
                    there.documents.add(document.first_block)
            on_blocks(sum(span.num_blocks for _, span in pieces), "comparing")
    return there


class _Matcher:
    """Walks through the bundle's documents beside those of the branch."""

    def __init__(self, bundle: BundleReader, writer: ContextWriter, reader: ContextReader) -> None:
        self._bundle = bundle
        self._writer = writer
        self._reader = reader
        self._growing = writer.open_document()
        # Cut documents have no key any more by which the writer would find them.
        self._cut: dict[tuple[str, int], list[int]] = {}
        for info in reader.documents():
            if info.state == "cut":
                self._cut.setdefault((info.meta.key, info.num_blocks), []).append(info.first_block)
        self._first_block = 0
        self._num_blocks = 0
        self.is_whole = False
        """Whether the branch has all of the document."""

    def begin(self, document: DocumentInfo) -> None:
        """Look up the next document of the bundle.

        Raises:
            BundleError: see `_compare`.
        """
        cut = self._cut.get((document.meta.key, document.num_blocks)) if document.state == "cut" else None
        if cut:
            self._first_block, self._num_blocks, self.is_whole = cut.pop(0), document.num_blocks, True
            return
        found = self._writer.document(document.meta.key)
        if found is not None and found.state != "open":
            self._begin_ended(document, found)
            return
        growing = self._growing
        if growing is not None and growing.key != document.meta.key:
            raise self._refused(f"document {growing.key!r} is still open there; end it, then import")
        self._growing = None
        self._first_block, self._num_blocks, self.is_whole = 0, 0, False
        if found is not None:
            self._first_block, self._num_blocks = found.first_block, found.num_blocks
            blocks_to_come = document.num_blocks - found.num_blocks
            if len(found.tail) or blocks_to_come < (1 if document.state == "complete" else 0):
                raise self._refused(f"document {document.meta.key!r} is open there and goes on; end it, then import")

    def _begin_ended(self, document: DocumentInfo, found: OpenDocument) -> None:
        # A part that ends early is in a document that does not.
        fits = found.num_blocks >= document.num_blocks if document.state == "cut" else _same(document, found)
        if not fits:
            raise self._refused(
                f"document {document.meta.key!r} has {found.num_tokens:,} tokens there and {document.num_tokens:,} "
                "in the bundle, or is of another text"
            )
        self._first_block, self._num_blocks, self.is_whole = found.first_block, document.num_blocks, True

    def compare(self, span: SpanWrite) -> int:
        """How many blocks of a span the branch has.

        Raises:
            BundleError: it has others in their place.
        """
        count = min(span.num_blocks, max(0, self._num_blocks - span.first_block))
        if count:
            tokens, _ = self._reader.tokens(self._first_block + span.first_block, count)
            if not np.array_equal(tokens, span.tokens[:count]):
                raise self._refused(f"document {span.document.key!r} holds other text there")
        return count

    def _refused(self, what: str) -> BundleError:
        version = self._writer.version()
        return BundleError(
            f"{self._bundle.path} cannot be imported into branch {version.branch!r} of context {version.context!r}: "
            f"{what}, or import into another context with --store.context. Nothing was written."
        )


def _same(document: DocumentInfo, found: OpenDocument) -> bool:
    mine = (document.num_blocks, document.num_tokens, document.meta.content_sha256)
    return mine == (found.num_blocks, found.num_tokens, found.meta.content_sha256)


# -- writing ---------------------------------------------------------------------------------------------------------


def _write(bundle: BundleReader, writer: ContextWriter, there: _There, on_blocks: OnBlocks) -> ImportResult:
    manifest = bundle.manifest
    message = f"import of {manifest.context} at version {manifest.version}, from block {manifest.first_block}"
    new_blocks = 0
    for pieces in bundle.blocks():
        missing = [piece for piece in pieces if piece[0].first_block not in there.documents]
        new_blocks += _append(writer, missing, message)
        on_blocks(sum(span.num_blocks for _, span in pieces), "writing")
    new_nodes = 0
    if manifest.upper_nodes and _stands_first(bundle, writer):
        for lod, first, _, arrays in bundle.upper_nodes():
            new_nodes += writer.put_nodes(lod, first, arrays).new_nodes
    num_missing = manifest.num_documents - len(there.documents)
    if num_missing or new_nodes:
        with writer.commit() as db:
            detail = {"from": manifest.context, "version": manifest.version, "blocks": new_blocks, "nodes": new_nodes}
            writer.audit(db, "import", detail)
    version = writer.flush().version
    levels_missing = any(
        version.num_nodes(lod + 1) < version.num_nodes(lod) // K for lod in range(1, version.max_lod + 1)
    )
    return ImportResult(version, num_missing, len(there.documents), new_blocks, new_nodes, levels_missing)


def _append(writer: ContextWriter, pieces: list[Piece], message: str) -> int:
    """Append pieces in as few commits as may be; returns how many blocks were new."""
    new_blocks = 0
    spans: list[SpanWrite] = []
    for document, span in pieces:
        spans.append(span)
        if document.state == "cut" and is_end(document, span):
            # It is ended by a commit of its own, and nothing may follow it before.
            new_blocks += writer.append(spans, _REQUEST, message).new_blocks
            writer.close_document(document.meta.key)
            spans = []
    if spans:
        new_blocks += writer.append(spans, _REQUEST, message).new_blocks
    return new_blocks


def _stands_first(bundle: BundleReader, writer: ContextWriter) -> bool:
    """Whether the branch begins with the bundle's documents, each in the same place."""
    with writer.reader() as reader:
        for document in bundle.documents():
            found = reader.document_at(document.first_block)
            mine = (document.meta.key, document.first_block, document.num_blocks)
            if (found.meta.key, found.first_block, found.num_blocks) != mine:
                return False
    return True
