"""The KV cache of a Working Context and of what is decoded behind it, kept across refocuses.

A row's keys and values depend on it, its place and every row before it. So an edit invalidates the rows from the
first one that differs on, and nothing before; rows are compared by what they hold, which needs no bookkeeping of
edits and cannot be wrong about them. Decoded tokens that the next Working Context shows where they were are found
again the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluster.errors import FocusError
from models.base_lm import BaseLM
from models.kv_cache import KVCache
from models.positions import Positions

PIECE_ROWS = 1024
"""Rows read in one pass: bounds the memory of attention scores on long Working Contexts."""


@dataclass(frozen=True)
class Reuse:
    """What a refocus spared."""

    num_reused: int
    """Rows whose keys and values stayed."""
    num_read: int
    """Rows read, of those there before and new ones."""


class FocusedCache:
    """One session's rows as the model has read them. Not for concurrent calls, as the model is not."""

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm
        self._cache: KVCache = lm.new_cache(origin_half_tokens=0)
        self._read_rows: list[Tensor] = []
        """What was read, in pieces: one a token decoded would be costly to join every time."""
        self._places: np.ndarray = np.empty(0, np.int64)
        self._next_half_token = 0
        self._logits: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows read: the Working Context's, and tokens decoded since."""
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Of keys and values, and of the rows they are compared by."""
        return self._cache.num_bytes + sum(rows.numel() * rows.element_size() for rows in self._read_rows)

    @property
    def next_half_token(self) -> int:
        """Place of the next token, in half tokens."""
        return self._next_half_token

    def logits(self) -> Float[Tensor, " V"]:
        """Of the token that comes next.

        Raises:
            FocusError: nothing has been read.
        """
        if self._logits is None:
            raise FocusError("nothing has been read yet; there is no next token")
        return self._logits

    def refocus(
        self, embeds: Float[Tensor, "rows D"], half_tokens: Int64[np.ndarray, " rows"], next_half_token: int
    ) -> Reuse:
        """Make the cache that of these rows at these places, reading from the first that differs on.

        Args:
            embeds: a Working Context's rows, at least one.
            half_tokens: their places, as `layout.lay_out` gives them.
            next_half_token: place of the token behind them.

        Raises:
            FocusError: no rows, or not as many places.
        """
        if len(embeds) == 0 or len(embeds) != len(half_tokens):
            raise FocusError(f"{len(embeds)} rows at {len(half_tokens)} places cannot be read; give at least one")
        kept = self._common(embeds, half_tokens)
        if kept == len(embeds) and (kept < self.num_rows or self._logits is None):
            kept -= 1  # what follows the last row is known only when it was the last one
        self._next_half_token = next_half_token
        if kept == len(embeds):
            return Reuse(kept, 0)
        self._cache.truncate(kept)
        self._read_rows = [rows[:kept] for rows in self._read_rows]  # `_common` joined them
        self._places = self._places[:kept]
        self._logits = None
        self._read(embeds[kept:], half_tokens[kept:])
        return Reuse(kept, len(embeds) - kept)

    def append(self, ids: Int64[np.ndarray, " n"]) -> None:
        """Read tokens behind what there is, at least one.

        Raises:
            FocusError: no tokens.
        """
        if len(ids) == 0:
            raise FocusError("append needs at least one token")
        tokens = torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None].to(self._lm.device)
        places = self._next_half_token + 2 * np.arange(len(ids), dtype=np.int64)
        self._next_half_token += 2 * len(ids)
        with torch.inference_mode():
            self._read(self._lm.embed(tokens)[0], places)

    def nll_of_next(self, token: int) -> float:
        """Negative log-likelihood of a token that comes next, in nats."""
        logits = self.logits().float()
        return float(logits.logsumexp(-1) - logits[token])

    def _common(self, embeds: Tensor, half_tokens: np.ndarray) -> int:
        """Rows that begin both what was read and what is to be."""
        num = min(len(embeds), self.num_rows)
        moved = np.flatnonzero(half_tokens[:num] != self._places[:num])
        num = int(moved[0]) if len(moved) else num
        if num == 0:
            self._read_rows.clear()
            return 0
        self._read_rows = [torch.cat(self._read_rows)]
        differs = (embeds[:num] != self._read_rows[0][:num]).any(dim=1)
        return int(differs.to(torch.int8).argmax()) if bool(differs.any()) else num

    def _read(self, embeds: Tensor, places: np.ndarray) -> None:
        with torch.inference_mode():
            for start in range(0, len(embeds), PIECE_ROWS):
                piece = slice(start, start + PIECE_ROWS)
                at = Positions(torch.from_numpy(np.ascontiguousarray(places[piece]))[None])
                logits = self._lm.logits(embeds[None, piece], positions=at, cache=self._cache, last_only=True)
                self._logits = logits[0, -1]
        self._read_rows.append(embeds)
        self._places = np.concatenate([self._places, places])
