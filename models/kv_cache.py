"""What a base LM keeps of the entries it has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from cluster.errors import ModelError
from models.positions import Positions


class KVCache:
    """Keys and values of every layer, and the zero point their rotary phases were computed from.

    Cached keys are already rotated, so every later call must measure positions from the same origin: the
    first entry's place when the cache was begun with explicit positions, token 0 otherwise.
    """

    def __init__(self, layers: DynamicCache, origin_half_tokens: int | None = None) -> None:
        """Args: `origin_half_tokens` settles the zero point at once, for caches that are to be joined."""
        self.layers = layers
        self._settled = origin_half_tokens
        self._origin_half_tokens: Tensor | None = None
        self._explicit = False

    @property
    def num_entries(self) -> int:
        """Entries held."""
        return int(self.layers.get_seq_length())

    def truncate(self, num_entries: int) -> None:
        """Forget every entry from number `num_entries` on; the ones before stay valid.

        Raises:
            ModelError: the cache holds fewer.
        """
        surplus = self.num_entries - num_entries
        if num_entries < 0 or surplus < 0:
            raise ModelError(f"cannot keep {num_entries} of {self.num_entries} cached entries")
        if num_entries == 0:
            self.layers = DynamicCache()
        elif surplus:
            self.layers.crop(-surplus)

    def origin(self, positions: Positions | None, batch_size: int, device: torch.device) -> Tensor:
        """The origin (B,) int64 in half tokens for a call at `positions`; settled while the cache is empty.

        Raises:
            ModelError: default positions on a cache that was begun with explicit ones: "the next position" is
                not known there.
        """
        empty = self.num_entries == 0
        if positions is None and self._explicit and not empty:
            raise ModelError("this cache was begun with explicit positions; give the positions of every later call")
        if empty or self._origin_half_tokens is None:
            self._explicit = positions is not None
            if positions is None or self._settled is not None:
                origin = torch.full((batch_size,), self._settled or 0, dtype=torch.int64, device=device)
            else:
                origin = positions.half_tokens.amin(dim=1).to(device)
            self._origin_half_tokens = origin
        return self._origin_half_tokens

    @classmethod
    def joined(cls, parts: Sequence[KVCache]) -> KVCache:
        """Caches one after the other, as if their entries had been read in this order without seeing each other.

        A part of one row stands before every row of the others. The parts stay as they are.

        Raises:
            ModelError: parts whose phases are measured from different places, or whose rows do not match.
        """
        origins = {part._settled for part in parts}
        if len(origins) != 1 or None in origins:
            raise ModelError("only caches made with one explicit origin can be joined")
        settled = parts[0]._settled or 0
        parts = [part for part in parts if part.num_entries]
        if not parts:
            return cls(DynamicCache(), settled)
        num_rows = max(part.num_rows for part in parts)
        if any(part.num_rows not in {1, num_rows} for part in parts):
            raise ModelError(f"caches of {[part.num_rows for part in parts]} rows cannot be joined")
        joined = DynamicCache()
        for number, layers in enumerate(zip(*(part._stack for part in parts), strict=True)):
            keys, values = (
                torch.cat([_expanded(getattr(layer, name), num_rows) for layer in layers], dim=2)
                for name in ("keys", "values")
            )
            joined.update(keys, values, number)
        return cls._begun(joined, settled, num_rows)

    @classmethod
    def stacked(cls, rows: Sequence[KVCache]) -> KVCache:
        """One-row caches of equal length as the rows of a batch.

        Raises:
            ModelError: rows of different lengths, or made with different origins.
        """
        if len({(row.num_entries, row._settled) for row in rows}) != 1 or rows[0]._settled is None:
            raise ModelError("only caches of one length, made with one explicit origin, can be stacked")
        if rows[0].num_entries == 0:
            return rows[0]
        stacked = DynamicCache()
        for number, layers in enumerate(zip(*(row._stack for row in rows), strict=True)):
            keys, values = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
            stacked.update(keys, values, number)
        return cls._begun(stacked, rows[0]._settled, len(rows))

    @classmethod
    def _begun(cls, layers: DynamicCache, origin_half_tokens: int, num_rows: int) -> KVCache:
        cache = cls(layers, origin_half_tokens)
        cache._explicit = True
        device = cache._stack[0].keys.device
        cache._origin_half_tokens = torch.full((num_rows,), origin_half_tokens, device=device)
        return cache

    @property
    def num_bytes(self) -> int:
        """Of all keys and values."""
        tensors = (
            [getattr(layer, name) for layer in self._stack for name in ("keys", "values")] if self.num_entries else []
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def num_rows(self) -> int:
        """Rows of the batch it was made for; 1 while it is empty."""
        return int(self._stack[0].keys.shape[0]) if self.num_entries else 1

    @property
    def settled_origin(self) -> int | None:
        """The zero point it was made with, in half tokens; None when its first entries settle it."""
        return self._settled

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (B, heads, entries, head size) each."""
        return self._stack[number].keys, self._stack[number].values

    @property
    def _stack(self) -> list[Any]:
        """Every layer's `keys` and `values`, (B, heads, entries, head size)."""
        return self.layers.layers

    def row(self, number: int) -> KVCache:
        """One row of the batch."""
        return self._part(lambda tensor: tensor[number : number + 1])

    def since(self, num_entries: int) -> KVCache:
        """The entries from number `num_entries` on."""
        return self._part(lambda tensor: tensor[:, :, num_entries:])

    def repeated(self, num_rows: int) -> KVCache:
        """A batch of so many rows that all hold what the one row holds."""
        return self._part(lambda tensor: _expanded(tensor, num_rows))

    def _part(self, select: Callable[[Tensor], Tensor]) -> KVCache:
        if self._settled is None:
            raise ModelError("only caches made with an explicit origin can be taken apart")
        selected = DynamicCache()
        for number, layer in enumerate(self._stack):
            selected.update(select(layer.keys), select(layer.values), number)
        if not self._stack:
            return KVCache(selected, self._settled)
        return self._begun(selected, self._settled, int(select(self._stack[0].keys).shape[0]))


def _expanded(tensor: Tensor, num_rows: int) -> Tensor:
    return tensor if tensor.shape[0] == num_rows else tensor.expand(num_rows, *tensor.shape[1:])
