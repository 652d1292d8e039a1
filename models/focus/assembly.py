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
from models.focus.history import EntryState, History, TreeReader
from models.focus.working_context import WorkingContext

Embed = Callable[[Int64[Tensor, "1 T"]], Float[Tensor, "1 T D"]]

PIECE_ROWS = 512
"""Rows converted at a time on a CPU: what comes between the two dtypes then stays in its cache."""


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
            fresh |= changed | _may_read_otherwise(previous.wc, wc)
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
                places = rows[entries][:, None] + np.arange(nodes.shape[1])
                _place(embeds, places.reshape(-1), nodes.flatten(0, 1))
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
        tail_ids = np.empty(0, np.int64)
        if wc.index[entries[-1]] == wc.histories[int(wc.source[entries[0]])].stop_block:
            tail = reader.tail()
            assert tail is not None  # the history counted its tokens
            tail_ids = tail.tokens.astype(np.int64)
        blocks = wc.index[entries[: len(entries) - bool(len(tail_ids))]]
        slots = np.empty((len(blocks), K), np.int64)
        # One read a run of consecutive blocks.
        for start, stop in _runs(blocks):
            slots[start:stop] = reader.tokens(int(blocks[start]), stop - start)[0]
        counts = wc.num_tokens[entries]
        ids = np.concatenate([slots[np.arange(K) < counts[: len(blocks), None]], tail_ids])
        # Token i of those of all entries stands as far behind its entry's first row as behind its first token.
        places = np.arange(len(ids)) + np.repeat(rows[entries] - (np.cumsum(counts) - counts), counts)
        _place(embeds, places, self._embed(torch.from_numpy(ids).to(self._device)[None])[0])


def _place(embeds: Tensor, places: np.ndarray, values: Tensor) -> None:
    """Convert `values` `(n, D)` into the rows of `embeds` at `places` `(n,)`, which ascend."""
    values = values.to(embeds.device)
    # Torch converts half to bfloat16 one value at a time; through float32 it takes a third of the time.
    through_float = (values.dtype, embeds.dtype) == (torch.float16, torch.bfloat16)
    size = PIECE_ROWS if values.device.type == "cpu" else max(len(values), 1)
    for start in range(0, len(values), size):
        piece, rows = values[start : start + size], places[start : start + size]
        if through_float:
            piece = piece.float()
        if rows[-1] - rows[0] == len(rows) - 1:
            embeds[int(rows[0]) : int(rows[-1]) + 1] = piece
        else:
            embeds.index_copy_(0, torch.from_numpy(rows).to(embeds.device), piece.to(embeds.dtype))


def _runs(*columns: np.ndarray) -> list[tuple[int, int]]:
    """Positions `[start, stop)` of the longest runs over which every column goes up by one."""
    if len(columns[0]) == 0:
        return []
    jumps = np.any([np.diff(column) != 1 for column in columns], axis=0)
    starts = [0, *(np.flatnonzero(jumps) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(columns[0])], strict=True))


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


def _may_read_otherwise(old: WorkingContext, new: WorkingContext) -> np.ndarray:
    """Entries of `new` whose rows may differ from those of the same node in `old`: `(n,)` bool."""
    otherwise = np.zeros(len(new), bool)
    for number, (before, after) in enumerate(zip(old.histories, new.histories, strict=False)):
        if before.seq == after.seq or (before.block_states is None and after.block_states is None):
            continue
        counts = np.append(0, np.cumsum(_unsettled(before, after)))
        mine = np.flatnonzero(new.source == number)
        start = (new.first_block[mine] - after.first_block).clip(max=len(counts) - 1)
        stop = (new.stop_block[mine] - after.first_block).clip(max=len(counts) - 1)
        otherwise[mine] = counts[stop] > counts[start]
    return otherwise


def _unsettled(before: History, after: History) -> np.ndarray:
    """Blocks of an earlier version, and its tail, whose tokens or gists another one may have replaced, as bool.

    Whole blocks stay as they are, and so do pruned ones. But a speculative block can be replaced at its place, and a
    gist that stood for tokens not yet written gives way to that of what was written.
    """
    was, now = _states_and_tail(before), _states_and_tail(after)
    both = min(len(was), len(now))
    unsettled = was == EntryState.SPECULATIVE
    unsettled[:both] |= was[:both] != now[:both]
    return unsettled


def _states_and_tail(history: History) -> np.ndarray:
    states = np.zeros(history.num_blocks + 1, np.int8)
    if history.block_states is not None:
        states[:-1] = history.block_states
    return states


def _copy_kept(embeds: Tensor, rows: np.ndarray, previous: Assembled, old: np.ndarray, fresh: np.ndarray) -> int:
    """Copy the rows of entries that stay, run by run; returns how many."""
    kept = np.flatnonzero(~fresh)
    target = rows[kept].tolist()
    source, stop = previous.row_of_entry[old[kept]].tolist(), previous.row_of_entry[old[kept] + 1].tolist()
    copied = 0
    for first, end in _runs(kept, old[kept]):
        size = stop[end - 1] - source[first]
        embeds[target[first] : target[first] + size] = previous.embeds[source[first] : source[first] + size]
        copied += size
    return copied


def _half_tokens(wc: WorkingContext, rows: np.ndarray) -> np.ndarray:
    """True places of all rows."""
    entry = np.repeat(np.arange(len(wc)), wc.cost)
    within = np.arange(int(rows[-1])) - rows[entry]
    return np.where(wc.lod[entry] == 0, 2 * (wc.first_token[entry] + within), wc.mu[entry])
