"""What stands before a horizon: rows of vectors and their true places, whatever made them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.focus.assembly import Assembled, Assembler
from models.focus.history import History
from models.focus.working_context import WorkingContext
from storage.contract import TreeReader
from storage.schema import GISTS


@dataclass(frozen=True, eq=False)
class Contents:
    """Rows the language model reads before the horizon."""

    embeds: Float[Tensor, "rows D"]
    half_tokens: Int64[np.ndarray, " rows"]
    """True places, counted from the history's first token: a token t at 2t, a gist at its span's centre."""

    @property
    def num_rows(self) -> int:
        """Slots used."""
        return len(self.embeds)

    def digest(self) -> bytes:
        """Equal for equal contents."""
        digest = hashlib.sha256(self.half_tokens.tobytes())
        digest.update(self.embeds.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.digest()

    @classmethod
    def joined(cls, parts: Sequence[Contents]) -> Contents:
        """Parts one after the other."""
        return cls(torch.cat([p.embeds for p in parts]), np.concatenate([p.half_tokens for p in parts]))

    def ordered(self, order: Int64[np.ndarray, " rows"]) -> Contents:
        """The same rows in another order."""
        return Contents(self.embeds[torch.from_numpy(order).to(self.embeds.device)], self.half_tokens[order])

    def rows(self, start: int, stop: int) -> Contents:
        """Rows `[start, stop)`."""
        return Contents(self.embeds[start:stop], self.half_tokens[start:stop])

    @classmethod
    def of(cls, assembled: Assembled) -> Contents:
        """Of a Working Context."""
        return cls(assembled.embeds, assembled.half_tokens)


class Reading:
    """One history of one reader, for the language model that reads it."""

    def __init__(
        self, lm: BaseLM, reader: TreeReader, history: History, constant: Float[Tensor, " D"] | None = None
    ) -> None:
        """Args: `constant` is what stands in every gist's place where none may say anything; default 0."""
        self.lm = lm
        self.constant = torch.zeros(lm.hidden_size, dtype=lm.dtype, device=lm.device) if constant is None else constant
        self.reader = reader
        self.history = history
        self._assembler = Assembler(self._embed, [reader], array=GISTS, dtype=lm.dtype, device=lm.device)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.lm.embed(ids)

    def context(self, wc: WorkingContext, *, same_gists: bool = False) -> Contents:
        """Rows of a Working Context of this history; with `same_gists` the constant stands in every gist's place."""
        contents = Contents.of(self._assembler.assemble(wc))
        if not same_gists:
            return contents
        is_gist = torch.from_numpy(np.repeat(wc.lod > 0, wc.cost)).to(contents.embeds.device)
        embeds = torch.where(is_gist[:, None], self.constant, contents.embeds)
        return Contents(embeds, contents.half_tokens)

    def raw(self, blocks: Sequence[int]) -> Contents:
        """Raw tokens of blocks in timeline order, each at its true place, and nothing else."""
        chosen = np.unique(np.asarray(blocks, np.int64))
        if len(chosen) == 0:
            return self.nothing()
        before = self.history.tokens_before
        ids, places = [], []
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            tokens, counts = self.reader.tokens(int(run[0]), len(run))
            used = np.arange(K) < counts[:, None]
            ids.append(tokens[used])
            first = before[run - self.history.first_block] - before[0]
            places.append((first[:, None] + np.arange(K))[used])
        return self.tokens(np.concatenate(ids), np.concatenate(places))

    def tokens(self, ids: np.ndarray, places: np.ndarray) -> Contents:
        """Tokens at places counted from the history's first token."""
        on_device = torch.from_numpy(ids.astype(np.int64))[None].to(self.lm.device)
        return Contents(self.lm.embed(on_device)[0], 2 * places.astype(np.int64))

    def nothing(self) -> Contents:
        """No row at all."""
        return Contents(
            self.lm.embed(torch.zeros((1, 0), dtype=torch.int64, device=self.lm.device))[0], np.empty(0, int)
        )

    def ids(self, first_block: int, num_blocks: int) -> np.ndarray:
        """Token ids of consecutive blocks, without unused slots, int64."""
        tokens, counts = self.reader.tokens(first_block, num_blocks)
        return tokens[np.arange(K) < counts[:, None]].astype(np.int64)
