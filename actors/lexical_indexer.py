"""The lexical indexer: makes the text of new blocks searchable, behind the commits.

Like the follower it keeps no state of its own: the index says how far it has come, so it goes on wherever it, or the
job, was stopped. It shares no file with the writer of the context, which never waits for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.config import BaseLMConfig, StoreConfig
from cluster.errors import IncompatibleTreeError, WriterConflictError
from models.tokenizer import Tokenizer
from storage.lexical.index import BATCH_BLOCKS, LexicalWriter
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.writer import MAIN_BRANCH


@dataclass(frozen=True)
class LexicalIndexerSpec:
    """Which context is indexed, and whose tokenizer turns its tokens into text."""

    store: StoreConfig
    base_lm: BaseLMConfig
    branch: str = MAIN_BRANCH
    batch_blocks: int = BATCH_BLOCKS
    """Blocks of a transaction; what a killed indexer does again."""


LOCK_WAIT_S = 10.0
"""How long to wait for the index's lock: a predecessor that was killed may take a moment to die."""


def has_index(store: StoreConfig) -> bool:
    """Whether what a job reads has a lexical index: `main` has. Other versions are searched in the tree itself, slower
    and with the same results."""
    return store.version == MAIN_BRANCH


def check_tokenizer(store: StoreConfig, tokenizer: Tokenizer) -> None:
    """Refuse to read a context's tokens with a tokenizer that did not make them.

    Raises:
        IncompatibleTreeError: naming both.
        ContextNotFoundError: no such store or context.
    """
    made_with = Store(store.root).identity(store.context)[0].tokenizer_digest
    if tokenizer.digest != made_with:
        raise IncompatibleTreeError(
            f"context {store.context!r} was written with another tokenizer: the tree has {made_with}, "
            f"{tokenizer.path} has {tokenizer.digest}. Its tokens would become another text; set --base_lm.source to "
            "the model it was made for."
        )


class LexicalIndexer:
    """Plain class; `LexicalIndexerActor` hosts it on the store's machine, where it reads the context directly."""

    def __init__(self, spec: LexicalIndexerSpec, tokenizer: Tokenizer) -> None:
        """Take the index writer's place.

        Raises:
            ContextNotFoundError, IncompatibleTreeError: see `check_tokenizer`.
            WriterConflictError: another process builds the index.
        """
        check_tokenizer(spec.store, tokenizer)
        self._spec = spec
        self._folder = Store(spec.store.root).folder(spec.store.context)

        self._writer = LexicalWriter(
            self._folder, tokenizer.decode_batch, branch=spec.branch, batch_blocks=spec.batch_blocks
        )

    @classmethod
    def patient(cls, spec: LexicalIndexerSpec, tokenizer: Tokenizer) -> LexicalIndexer:
        """The same, waiting `LOCK_WAIT_S` for the place: the process that had it may be dying. Errors as there."""
        give_up = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return cls(spec, tokenizer)
            except WriterConflictError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)

    @property
    def num_blocks(self) -> int:
        """Blocks of the timeline that are indexed."""
        return self._writer.num_blocks

    def advance(self) -> int:
        """Index every block that can be indexed now; returns how many.

        Raises:
            DiskFullError, StorageError: the disk refused; what was indexed stays.
        """
        made = 0
        while True:
            # A fresh pin for every round: blocks committed meanwhile become visible.
            with ContextReader(self._folder, self._spec.store.context, self._spec.branch) as reader:
                num_blocks = self._writer.advance(reader)
            if num_blocks == 0:
                return made
            made += num_blocks

    def close(self) -> None:
        """Give up the index writer's place."""
        self._writer.close()


class LexicalIndexerActor:
    """Hosts an indexer; the first call opens it, so that a refusal reaches the caller as itself."""

    def __init__(self, spec: LexicalIndexerSpec) -> None:
        self._spec = spec
        self._indexer: LexicalIndexer | None = None

    def advance(self) -> int:
        """As `LexicalIndexer.advance`."""
        if self._indexer is None:
            self._indexer = LexicalIndexer.patient(self._spec, Tokenizer.load(self._spec.base_lm))
        return self._indexer.advance()

    def close(self) -> None:
        """Give up the index writer's place."""
        if self._indexer is not None:
            self._indexer.close()
            self._indexer = None
