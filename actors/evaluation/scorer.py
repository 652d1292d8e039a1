"""What a frozen language model predicts after given contents: the measuring instrument.

`Scorer.nll` is exact: one pass over contents and horizon. `CandidateScorer` compares many blocks that could be added
to the same contents by reading contents, blocks and horizon apart and joining their caches: a block is read after
the stand-ins but not after the other blocks, and the raw tail has not seen it. That is for choosing only; what was
chosen is measured exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int64

from actors.evaluation.contents import Contents, Reading
from models.base_lm import IGNORED_TARGET, BaseLM
from models.focus.layout import Policy, lay_out
from models.kv_cache import KVCache
from models.positions import Positions
from models.shared_past import SharedPast
from storage.contract import TreeReader

PIECE_BLOCKS = 8
"""Of a full history that is read at a time: 256 tokens, as far apart as places that share a history's beginning."""

CANDIDATES_AT_A_TIME = 16
"""Rows of a batch: 1,000 entries at a horizon of 64."""


class Scorer:
    """A language model under a position policy."""

    def __init__(self, lm: BaseLM, policy: Policy = "global") -> None:
        self.lm = lm
        self.policy: Policy = policy

    def nll(
        self, contents: Contents, ids: Int64[np.ndarray, " n"], num_tokens: int, policy: Policy | None = None
    ) -> Float32[np.ndarray, " n-1"]:
        """NLL in nats of `ids[1:]`, each given the contents and the ids before it.

        The first id is not scored, so that contents without a last token compare with those that have one.

        Args:
            contents: what stands before.
            ids: horizon, or a question with its answer.
            num_tokens: real tokens of the history: the place of `ids[0]`.
            policy: where rows are put, if not by the scorer's.
        """
        layout = lay_out(policy or self.policy, contents.half_tokens, num_tokens)
        device = self.lm.device
        tokens = torch.from_numpy(np.ascontiguousarray(ids))[None].to(device)
        places = np.concatenate([layout.half_tokens, layout.next_half_token + 2 * np.arange(len(ids) - 1)])
        targets = torch.full((1, contents.num_rows + len(ids) - 1), IGNORED_TARGET, device=device)
        targets[0, contents.num_rows :] = tokens[0, 1:]
        with torch.inference_mode():
            nll = self.lm.nll(
                torch.cat([contents.embeds[None], self.lm.embed(tokens[:, :-1])], dim=1),
                targets,
                positions=Positions(torch.from_numpy(places)[None]),
                start=contents.num_rows,
            )
        return nll[0].cpu().numpy()


class BlockCaches:
    """Blocks of one history, each read once after the same stand-ins, for every question that is asked of them."""

    def __init__(
        self,
        lm: BaseLM,
        stand_ins: Contents,
        blocks: Sequence[Contents],
        num_tokens: int,
        policy: Policy = "global",
    ) -> None:
        """Read them; blocks of equal length go through the model as one batch.

        Args:
            lm: reads.
            stand_ins: rows before every block: the gists of the whole history.
            blocks: raw tokens, 1 to 32 rows each.
            num_tokens: real tokens of the history.
            policy: `global`: true places. Any other: stand-ins, blocks in their order and the tail stand one after the
                other, as if all of them were shown, so that the model knows the distances at any length.
        """
        self.lm = lm
        self._true_end = 2 * num_tokens if policy == "global" else None
        if self._true_end is None:
            timeline = sorted(range(len(blocks)), key=lambda i: blocks[i].half_tokens[0])
            parts = one_after_the_other([stand_ins, *(blocks[i] for i in timeline)])
            stand_ins = parts[0]
            blocks = [part for _, part in sorted(zip(timeline, parts[1:], strict=True), key=lambda pair: pair[0])]
        self._num_rows = stand_ins.num_rows + sum(block.num_rows for block in blocks)
        self.stand_ins = lm.new_cache(origin_half_tokens=0)
        self._read([stand_ins], self.stand_ins)
        self.blocks: list[KVCache] = [self.stand_ins] * len(blocks)
        for members in _by_length([contents.num_rows for contents in blocks]):
            cache = KVCache.joined([self.stand_ins]).repeated(len(members))
            self._read([blocks[i] for i in members], cache)
            own = cache.since(stand_ins.num_rows)
            for row, member in enumerate(members):
                self.blocks[member] = own.row(row)

    def behind(self, tail: Contents) -> tuple[KVCache, int]:
        """A cache of the stand-ins and a raw tail read after them, and the place of the token that comes next."""
        cache = KVCache.joined([self.stand_ins])
        end = self._true_end
        if end is None:
            end = 2 * (self._num_rows + tail.num_rows)
            tail = Contents(tail.embeds, end - 2 * np.arange(tail.num_rows, 0, -1))
        self._read([tail], cache)
        return cache, end

    def _read(self, rows: Sequence[Contents], cache: KVCache) -> None:
        """Extend a cache by contents of equal length, one a row of the batch."""
        if rows[0].num_rows == 0:
            return
        places = torch.from_numpy(np.stack([contents.half_tokens for contents in rows]))
        with torch.inference_mode():
            embeds = torch.stack([contents.embeds for contents in rows])
            self.lm.read(embeds, positions=Positions(places), cache=cache)


def one_after_the_other(parts: Sequence[Contents]) -> list[Contents]:
    """The same rows at consecutive places from 0 on."""
    ends = np.cumsum([part.num_rows for part in parts])
    return [
        Contents(part.embeds, 2 * np.arange(end - part.num_rows, end)) for part, end in zip(parts, ends, strict=True)
    ]


class CandidateScorer:
    """Contents to which blocks could be added, and what each would do for some tokens behind the history."""

    def __init__(self, caches: BlockCaches, tail: Contents) -> None:
        """Read the tail after the stand-ins of `caches`; the contents are both."""
        self._caches = caches
        self._lm = caches.lm
        self._base, self._next_half_token = caches.behind(tail)

    def nll(self, chosen: Sequence[int], ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, " n-1"]:
        """NLL of `ids[1:]` after the base with the chosen blocks."""
        return self.nll_with_each(chosen, [()], ids)[0]

    def nll_with_each(
        self, chosen: Sequence[int], added: Sequence[Sequence[int]], ids: Int64[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "len_added n-1"]:
        """NLL of `ids[1:]` after the base with the chosen blocks, and with each of `added` in turn."""
        device = self._lm.device
        tokens = torch.from_numpy(np.ascontiguousarray(ids))[None].to(device)
        embeds = self._lm.embed(tokens[:, :-1])
        places = torch.from_numpy(self._next_half_token + 2 * np.arange(len(ids) - 1))[None]
        blocks = self._caches.blocks
        with torch.inference_mode():
            shared = KVCache.joined([self._base, *(blocks[i] for i in chosen)])
        nll = []
        # Rows of one batch must be equally long: blocks of other lengths get batches of their own.
        for members in _by_length([sum(blocks[i].num_entries for i in more) for more in added]):
            for start in range(0, len(members), CANDIDATES_AT_A_TIME):
                part = members[start : start + CANDIDATES_AT_A_TIME]
                with torch.inference_mode():
                    own = [KVCache.joined([blocks[i] for i in added[m]]) for m in part if added[m]]
                    found = self._lm.nll(
                        embeds.expand(len(part), -1, -1),
                        tokens[:, 1:].expand(len(part), -1),
                        positions=Positions(places.expand(len(part), -1)),
                        cache=SharedPast(shared, KVCache.stacked(own) if own else None),
                    )
                nll += list(zip(part, found.cpu().numpy(), strict=True))
        return np.stack([values for _, values in sorted(nll, key=lambda pair: pair[0])])


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Positions grouped by their length."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        groups.setdefault(length, []).append(position)
    return list(groups.values())


class FullHistory:
    """Raw histories that begin at the same block and end one after the other: what was read is not read again.

    They are read in pieces that begin at fixed blocks, so that a result does not depend on which histories came before.
    """

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm
        self._cache = lm.new_cache(origin_half_tokens=0)
        self._reader: TreeReader | None = None
        self._first_block = -1
        self._stop_block = -1
        """End of the whole pieces read."""

    def nll(self, reading: Reading, ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, " n-1"]:
        """NLL of `ids[1:]` after the whole history in raw tokens, as `Scorer.nll` of it."""
        history = reading.history
        same = reading.reader is self._reader and history.first_block == self._first_block
        if not same or history.stop_block < self._stop_block:
            self._cache = self._lm.new_cache(origin_half_tokens=0)
            self._reader = reading.reader
            self._first_block = self._stop_block = history.first_block
        tokens = torch.from_numpy(np.ascontiguousarray(ids))[None].to(self._lm.device)
        with torch.inference_mode():
            while self._stop_block + PIECE_BLOCKS <= history.stop_block:
                self._read(reading, self._stop_block, self._stop_block + PIECE_BLOCKS)
                self._stop_block += PIECE_BLOCKS
            num_kept = self._cache.num_entries
            self._read(reading, self._stop_block, history.stop_block)
            places = 2 * (history.num_tokens + torch.arange(len(ids) - 1))[None]
            nll = self._lm.nll(
                self._lm.embed(tokens[:, :-1]), tokens[:, 1:], positions=Positions(places), cache=self._cache
            )
            self._cache.truncate(num_kept)
        return nll[0].cpu().numpy()

    def _read(self, reading: Reading, first_block: int, stop_block: int) -> None:
        rows = reading.raw(range(first_block, stop_block))
        if rows.num_rows:
            places = Positions(torch.from_numpy(rows.half_tokens)[None])
            self._lm.read(rows.embeds[None], positions=places, cache=self._cache)
