"""From a Working Context to the vectors the language model reads, touching only what changed.

Rows: one a raw token, m a gist, in the order of the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import FocusError
from models.focus.history import TreeReader
from models.focus.working_context import WorkingContext

Embed = Callable[[Int64[Tensor, "1 T"]], Float[Tensor, "1 T D"]]


@dataclass(frozen=True, eq=False)
class Assembled:
    """A Working Context as rows."""

    wc: WorkingContext
    embeds: Float[Tensor, "rows D"]
    half_tokens: Int64[np.ndarray, " rows"]
    """True places: a token t at 2t, a gist at its span's centre, counted from the first history's beginning."""
    row_of_entry: Int64[np.ndarray, " n_plus_1"]
    """Rows `[row_of_entry[i], row_of_entry[i + 1])` are entry i."""
    num_reused: int = 0
    """Rows taken over from the Working Context before; the others were read."""

    @property
    def num_rows(self) -> int:
        """Rows, equal to the Working Context's cost."""
        return len(self.embeds)


class Assembler:
    """Reads entries through readers, one a history, and embeds raw tokens with the language model's table."""

    def __init__(
        self, embed: Embed, readers: Sequence[TreeReader], *, array: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Args: `array` is the name of the levels' array that the model reads: the gists."""
        self._embed = embed
        self._readers = list(readers)
        self._array = array
        self._dtype = dtype
        self._device = device

    def assemble(self, wc: WorkingContext, previous: Assembled | None = None) -> Assembled:
        """Rows of a Working Context; those of `previous` whose entries stay are copied, not read again.

        Raises:
            FocusError: another number of readers than histories, or one pinned to another version.
            StorageError: what reading meets.
        """
        self._check_readers(wc)
        rows = np.concatenate([[0], np.cumsum(wc.cost)])
        old = np.full(len(wc), -1) if previous is None else _positions_in(previous.wc, wc)
        fresh = old < 0
        if previous is not None:
            # The tail grows in place; its entry keeps its name.
            changed = ~fresh
            changed[changed] = previous.wc.num_tokens[old[~fresh]] != wc.num_tokens[~fresh]
            fresh |= changed
        embeds = self._empty(int(rows[-1]), previous)
        num_reused = 0
        if previous is not None and not fresh.all():
            num_reused = _copy_kept(embeds, rows, previous, old, fresh)
        for source, reader in enumerate(self._readers):
            mine = fresh & (wc.source == source)
            self._read_blocks(wc, reader, np.flatnonzero(mine & (wc.lod == 0)), rows, embeds)
            for lod in np.unique(wc.lod[mine & (wc.lod > 0)]).tolist():
                entries = np.flatnonzero(mine & (wc.lod == lod))
                nodes = reader.read(self._array, lod, wc.index[entries])
                target = rows[entries][:, None] + np.arange(nodes.shape[1])
                embeds[torch.from_numpy(target.reshape(-1)).to(self._device)] = nodes.flatten(0, 1).to(
                    self._device, self._dtype
                )
        return Assembled(wc, embeds, _half_tokens(wc, rows), rows, num_reused)

    def _empty(self, num_rows: int, previous: Assembled | None) -> Tensor:
        if previous is not None:
            return previous.embeds.new_empty((num_rows, previous.embeds.shape[1]))
        with torch.no_grad():
            width = self._embed(torch.zeros((1, 1), dtype=torch.int64, device=self._device)).shape[-1]
        return torch.empty((num_rows, width), dtype=self._dtype, device=self._device)

    def _check_readers(self, wc: WorkingContext) -> None:
        if len(self._readers) != len(wc.histories):
            raise FocusError(f"{len(wc.histories)} histories need as many readers, not {len(self._readers)}")
        for history, reader in zip(wc.histories, self._readers, strict=True):
            found = (reader.version.context, reader.version.seq)
            if found != (history.context, history.seq):
                raise FocusError(f"the reader is pinned to {found}, the history to {(history.context, history.seq)}")

    def _read_blocks(
        self, wc: WorkingContext, reader: TreeReader, entries: np.ndarray, rows: np.ndarray, embeds: Tensor
    ) -> None:
        if len(entries) == 0:
            return
        ids, places = [], []
        source = int(wc.source[entries[0]])
        stop_block = wc.histories[source].stop_block
        blocks = wc.index[entries]
        if blocks[-1] == stop_block:
            tail = reader.tail()
            assert tail is not None  # the history counted its tokens
            ids.append(tail.tokens)
            places.append(np.arange(int(rows[entries[-1]]), int(rows[entries[-1] + 1])))
            entries, blocks = entries[:-1], blocks[:-1]
        # One read a run of consecutive blocks.
        for run in np.split(np.arange(len(blocks)), np.flatnonzero(np.diff(blocks) != 1) + 1):
            if len(run) == 0:
                continue
            tokens, counts = reader.tokens(int(blocks[run[0]]), len(run))
            used = np.arange(K) < counts[:, None]
            ids.append(tokens[used])
            starts = rows[entries[run]]
            places.append((starts[:, None] + np.arange(K))[used])
        joined = torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(self._device)
        target = torch.from_numpy(np.concatenate(places)).to(self._device)
        embeds[target] = self._embed(joined[None])[0].to(self._dtype)


def _positions_in(old: WorkingContext, new: WorkingContext) -> np.ndarray:
    """Position in `old` of every entry of `new`, or -1: `(n,)`."""
    if len(old) == 0 or len(new) == 0 or len(old.histories) != len(new.histories):
        return np.full(len(new), -1)
    for mine, theirs in zip(old.histories, new.histories, strict=True):
        # Another tree, or another beginning, puts every entry elsewhere.
        named = (mine.context, mine.first_block, mine.encoding)
        if named != (theirs.context, theirs.first_block, theirs.encoding):
            return np.full(len(new), -1)
    old_names, new_names = _names(old), _names(new)
    order = np.argsort(old_names)
    found = np.searchsorted(old_names, new_names, sorter=order).clip(max=len(old) - 1)
    positions = order[found]
    return np.where(old_names[positions] == new_names, positions, -1)


def _names(wc: WorkingContext) -> np.ndarray:
    """One number an entry: 16 bits of source, 6 of level, 42 of index."""
    return (wc.source.astype(np.int64) << 48) | (wc.lod.astype(np.int64) << 42) | wc.index


def _copy_kept(embeds: Tensor, rows: np.ndarray, previous: Assembled, old: np.ndarray, fresh: np.ndarray) -> int:
    """Copy the rows of entries that stay, run by run; returns how many."""
    kept = np.flatnonzero(~fresh)
    if len(kept) == 0:
        return 0
    breaks = np.flatnonzero((np.diff(kept) != 1) | (np.diff(old[kept]) != 1)) + 1
    copied = 0
    for run in np.split(kept, breaks):
        start, stop = int(rows[run[0]]), int(rows[run[-1] + 1])
        source = int(previous.row_of_entry[old[run[0]]])
        embeds[start:stop] = previous.embeds[source : source + stop - start]
        copied += stop - start
    return copied


def _half_tokens(wc: WorkingContext, rows: np.ndarray) -> np.ndarray:
    """True places of all rows."""
    entry = np.repeat(np.arange(len(wc)), wc.cost)
    within = np.arange(int(rows[-1])) - rows[entry]
    return np.where(wc.lod[entry] == 0, 2 * (wc.first_token[entry] + within), wc.mu[entry])
