"""What a base LM keeps of the entries it has read."""

from __future__ import annotations

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

    def __init__(self, layers: DynamicCache) -> None:
        self.layers = layers
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
            self._origin_half_tokens = (
                torch.zeros(batch_size, dtype=torch.int64, device=device)
                if positions is None
                else positions.half_tokens.amin(dim=1).to(device)
            )
        return self._origin_half_tokens
