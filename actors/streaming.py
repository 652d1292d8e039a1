"""Live ingest: a document that grows token by token, durable at once, compacted block by block.

The result is, bit for bit, what bulk ingest of the finished document gives.
"""

from __future__ import annotations

import numpy as np

from actors.compactor import Compactor
from actors.packing import Window
from cluster.config import SLOTS_PER_SUPER_BLOCK as WINDOW_TOKENS
from cluster.config import TOKENS_PER_BLOCK as K
from models.window_encoder import OpenWindow
from storage.contract import Ack, DocumentMeta, TreeWriter


class DocumentStream:
    """One growing document. After a restart, make it again with the same document: it goes on where it was."""

    def __init__(
        self, writer: TreeWriter, compactor: Compactor, document: DocumentMeta, *, blocks_at_a_time: int = 1
    ) -> None:
        """Begin or continue a document; no other may be open in the context.

        Args:
            writer: of the context.
            compactor: makes the gists.
            document: whose tokens come.
            blocks_at_a_time: full blocks wait for their gists, raw and durable as the tail, until the window holds a
                multiple of so many: it is read in chunks, and one that is not full is read again when it has grown.
        """
        self._writer = writer
        self._compactor = compactor
        self._document = document
        # Tokens of the current window, all of which its last blocks see, and what is kept of encoding them.
        self._window = np.empty(0, np.uint32)
        self._kept = OpenWindow()
        self._window_start = 0
        self._stored_blocks = 0
        self._blocks_at_a_time = blocks_at_a_time
        mark = writer.marks([document.key]).get(document.key)
        if mark is not None:
            self._restore(mark.num_blocks)

    @property
    def key(self) -> str:
        """Of the document."""
        return self._document.key

    @property
    def num_tokens(self) -> int:
        """Tokens of the document so far, all durable."""
        return self._window_start + len(self._window)

    @property
    def last_token(self) -> int | None:
        """The newest token; None while there is none."""
        if len(self._window):
            return int(self._window[-1])
        if self._stored_blocks == 0:
            return None
        reader = self._writer.reader()
        try:
            return int(reader.tokens(reader.version.num_blocks - 1, 1)[0][0, -1])
        finally:
            reader.close()

    def _restore(self, num_blocks: int) -> None:
        """Read the current window and the tail back from the tree."""
        self._stored_blocks = num_blocks
        self._window_start = num_blocks * K // WINDOW_TOKENS * WINDOW_TOKENS
        reader = self._writer.reader()
        try:
            in_window = num_blocks - self._window_start // K
            if in_window:
                # It is the open document, so its blocks are the newest of the timeline.
                tokens, _ = reader.tokens(reader.version.num_blocks - in_window, in_window)
                self._window = tokens.reshape(-1)
            tail = reader.tail()
            if tail is not None and tail.document.key == self._document.key:
                self._window = np.concatenate([self._window, tail.tokens])
        finally:
            reader.close()
        self._store_full_blocks()

    def push(self, tokens: np.ndarray) -> Ack:
        """Add tokens, `(n,)` uint32. Durable when it returns, and compacted as far as blocks are full."""
        tokens = np.ascontiguousarray(tokens, np.uint32)
        ack = self._writer.append_tail(self._document, self.num_tokens, tokens)
        rest = tokens
        while len(rest):
            room = WINDOW_TOKENS - len(self._window)
            self._window, rest = np.concatenate([self._window, rest[:room]]), rest[room:]
            ack = self._store_full_blocks() or ack
        return ack

    def finish(self) -> Ack:
        """End the document: its last block may be short."""
        if len(self._window) > self._blocks_in_window() * K:
            return self._store(len(self._window), last=True)
        return self._writer.close_document(self._document.key, complete=True)

    def _blocks_in_window(self) -> int:
        return self._stored_blocks - self._window_start // K

    def _store_full_blocks(self) -> Ack | None:
        """Compact the blocks that became full; start a new window when this one is."""
        full = len(self._window) // K
        if len(self._window) < WINDOW_TOKENS:
            full -= full % self._blocks_at_a_time
        ack = self._store(full * K, last=False) if full > self._blocks_in_window() else None
        if len(self._window) == WINDOW_TOKENS:
            self._window, self._window_start = self._window[:0], self._window_start + WINDOW_TOKENS
            self._kept = OpenWindow()
        return ack

    def _store(self, num_tokens: int, *, last: bool) -> Ack:
        window = Window(self._document, self._window_start // K, self._window[:num_tokens], last)
        new = self._compactor.encode_grown(window, self._blocks_in_window(), self._kept)
        ack = self._writer.append([new])
        self._stored_blocks += new.num_blocks
        return ack
