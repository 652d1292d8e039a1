"""What a session remembers: its own context, which it writes, and others, which it only reads.

The tree is the state. Everything said is durable in it before anything depends on it, so a session that ends anywhere
goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.compactor import Compactor
from actors.follower import FollowerSpec, LevelFollower, next_missing
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec, has_index
from actors.plan import CompactionPlan
from actors.streaming import DocumentStream
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import StoreConfig
from cluster.errors import StorageError, WriterConflictError
from models.base_lm import BaseLM
from models.focus.history import History
from storage.contract import DocumentInfo, DocumentMeta, TreeReader
from storage.schema import check_same
from storage.store import LEASE_S, PinnedReader, Store
from storage.tree.reader import ContextReader

logger = logging.getLogger("megacontext.session")

TURNS_URI = "session:"
"""Prefix of the documents that hold what was said."""


@dataclass(frozen=True)
class Span:
    """A block, and where it comes from."""

    context: str
    document: DocumentInfo
    block: int
    source: int
    first_token: int
    """Of the document: its tokens before this block."""

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.document.meta.uri}, token {self.first_token:,}"


class SessionMemory:
    """Histories a Working Context is made of: the contexts that are read, in their order, then the session's own."""

    def __init__(
        self,
        plan: CompactionPlan,
        store: StoreConfig,
        reads: Sequence[str],
        base_lm: BaseLM,
        *,
        compact_tokens: int,
        owner: str,
    ) -> None:
        """Open the contexts, and make the session's own where there is none.

        Args:
            plan: the models; every context must be theirs.
            store: where they are; `context` is the session's own.
            reads: the others.
            base_lm: loaded as a whole; gists are made with its lower layers.
            compact_tokens: of full blocks that wait for their gists.
            owner: who writes, shown to those who are refused.

        Raises:
            ContextNotFoundError: one that is read does not exist.
            IncompatibleTreeError: one was made by another model or net.
            WriterConflictError: another process writes the session's own.
        """
        self._plan = plan
        self._blocks_at_a_time = compact_tokens // K
        self._store = Store(store.root, create=True)
        for name in reads:
            hint = "Read a context that the same model and net made, or re-derive its gists with `tree rebuild-gists`"
            for found, expected in zip(self._store.identity(name), (plan.identity, plan.encoding), strict=True):
                check_same(f"context {name!r}", found, expected, hint)
        spec = plan.compactor_spec(torch.get_num_threads(), 1)
        self._compactor = Compactor(spec, plan.gistnet, base_lm)
        self._readers: list[PinnedReader] = []
        self._own: ContextReader | None = None
        self._indexer: LexicalIndexer | None = None
        self._writer = self._store.open_writer(
            store.context,
            plan.identity,
            plan.encoding,
            create=True,
            branch=store.version,
            segment_super_blocks=store.segment_super_blocks,
            owner=owner,
        )
        try:
            self._readers = [self._store.open_reader(name) for name in reads]
            self._renewed_at = time.monotonic()
            self._read_histories = [self._history(reader) for reader in self._readers]
            self._follower = LevelFollower(
                FollowerSpec(self._writer.folder, self._writer.name, torch.get_num_threads(), branch=store.version),
                plan.gistnet,
                self._writer.put_nodes,
            )
            self._indexer = self._index(store)
            left = self._writer.open_document()
            self._unfinished = left
            """A document that an interrupted run left open; it goes on when it is read again."""
            self._stream: DocumentStream | None = None
            if left is not None and left.uri.startswith(TURNS_URI):
                self._stream = self._open(left)
        except BaseException:
            self.close()
            raise

    def _index(self, store: StoreConfig) -> LexicalIndexer | None:
        if not has_index(store):
            return None
        try:
            return LexicalIndexer(LexicalIndexerSpec(store, self._plan.base_lm), self._plan.tokenizer)
        except WriterConflictError as error:
            logger.warning("%s; new blocks are searched without an index", error)
            return None

    def _history(self, reader: TreeReader) -> History:
        return History.of(reader, vectors_per_node=self._plan.gistnet.num_vectors)

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of the session's own context."""
        return self._writer.name

    @property
    def folder(self) -> Path:
        """Of the session's own context."""
        return self._writer.folder

    def folder_of(self, source: int) -> Path:
        """Of any of the contexts."""
        return self._store.folder(self.readers()[source].version.context)

    @property
    def num_tokens(self) -> int:
        """Tokens of all contexts, the tail included."""
        return sum(history.num_tokens for history in self.histories())

    def readers(self) -> list[ContextReader]:
        """One a context, pinned; the last is of the session's own, as new as the last write."""
        self._renew()
        if self._own is None:
            self._own = self._writer.reader()
        return [*self._readers, self._own]

    def histories(self) -> list[History]:
        """One a context, of `readers`."""
        own = self.readers()[-1]
        return [*self._read_histories, self._history(own)]

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_at > LEASE_S / 3:
            for reader in self._readers:
                reader.renew()
            self._renewed_at = time.monotonic()

    def span(self, block: int, source: int) -> Span:
        """Where a block comes from.

        Raises:
            NodeMissingError: the context does not hold it.
        """
        reader = self.readers()[source]
        document = reader.document_at(block)
        before = reader.tokens_before(np.array([document.first_block, block]))
        return Span(reader.version.context, document, block, source, int(before[1] - before[0]))

    def text(self, block: int, source: int) -> str:
        """Of a block."""
        tokens, counts = self.readers()[source].tokens(block, 1)
        return self.decode(tokens[0, : counts[0]])

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens."""
        return self._plan.tokenizer.decode(tokens.astype(np.int64))

    # -- writing ---------------------------------------------------------------------------------------------------

    @property
    def last_token(self) -> int | None:
        """The newest token of the turns; None where what comes is their beginning."""
        return None if self._stream is None else self._stream.last_token

    def turns_document(self) -> DocumentInfo | None:
        """What is being said, once it has a block with a gist."""
        if self._stream is None:
            return None
        documents = self.readers()[-1].documents()
        return documents[-1] if documents and documents[-1].meta.key == self._stream.key else None

    def _open(self, document: DocumentMeta) -> DocumentStream:
        """Begin or continue a document; another one that is left unfinished is ended as it is."""
        left, self._unfinished = self._unfinished, None
        if left is not None and left.key != document.key:
            logger.warning("document %s was left open and does not go on now; it stays, cut", left.uri)
            self._writer.close_document(left.key)
        return DocumentStream(self._writer, self._compactor, document, blocks_at_a_time=self._blocks_at_a_time)

    def say(self, tokens: np.ndarray) -> None:
        """Append tokens to the turns: durable when it returns, and compacted as far as enough blocks are full."""
        if self._stream is None:
            number = sum(d.meta.uri.startswith(TURNS_URI) for d in self.readers()[-1].documents()) + 1
            uri = f"{TURNS_URI}{self.name}/{number}"
            self._stream = self._open(DocumentMeta(uri, uri, modified_at=time.time(), tags=("session",)))
        self._stream.push(tokens)
        self._grown()

    def read_document(self, document: DocumentMeta, tokens: np.ndarray) -> bool:
        """Append a document of its own; False where the context holds it already. The turns begin anew after it.

        Raises:
            StorageError: a document without tokens.
        """
        mark = self._writer.marks([document.key]).get(document.key)
        if mark is not None and mark.state == "complete":
            return False
        if len(tokens) == 0:
            raise StorageError(f"{document.uri} holds no text")
        if self._stream is not None:
            self._stream.finish()
            self._stream = None
        stream = self._open(document)
        # An earlier run may have read a part of it.
        stream.push(tokens[stream.num_tokens :])
        stream.finish()
        self._grown()
        return True

    def _grown(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None
        if next_missing(self._writer.version()) is not None:
            self._follower.advance()

    def index(self) -> None:
        """Make the text of new blocks searchable by the index; until then they are searched without it."""
        if self._indexer is not None:
            self._indexer.advance()

    def close(self) -> None:
        """Make everything durable and give up the writer's place."""
        if self._indexer is not None:
            self._indexer.close()
        for reader in (*self._readers, *([self._own] if self._own is not None else [])):
            reader.close()
        self._readers, self._own = [], None
        self._writer.close()
