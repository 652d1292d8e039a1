"""The Working Context: ordered entries of a tree that together represent a whole history within a budget.

Two modes. `strict`: a tiling without gap or overlap. `overlay`: an ancestor stays as the stand-in for the rest while
descendants of it are shown in more detail at their place. In both every slot is represented.

What is there of a node is its state. Of blocks that are gist-only or tombstoned no raw tokens are shown, of a node that
is tombstoned as a whole nothing below it: it stays represented, by its coarsest gist.

Entries stand in timeline order, an ancestor before its descendants. Everything is a flat array over the n entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Int16, Int64

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError, FocusError
from models.focus.history import SHOWN_RAW, EntryState, History, blocks_per_node

Mode = Literal["strict", "overlay"]

DEFAULT_MODE: Mode = "overlay"
"""Of the two the better at the same choice of blocks; measured, see docs/headroom.md."""


class Node(NamedTuple):
    """An entry's name: which history it is of, its level and index (at LOD0 the index of the block).

    The tail behind the last block is the LOD0 node after it.
    """

    lod: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    source: int = 0


@dataclass(frozen=True, eq=False)
class WorkingContext:
    """Immutable: edits return another one. Legal by construction.

    Raises:
        FocusError: a node that is not there or is outside the history, an entry given twice, a slot that nothing
            represents, in `strict` two entries over one slot, or detail of what the states do not let show.
        BudgetError: the entries cost more than the budget.
    """

    mode: Mode
    budget: int
    """W_max: what the entries may cost together, in vectors the model reads."""
    histories: tuple[History, ...]
    source: Int16[np.ndarray, " n"]
    """Position in `histories`."""
    lod: Int8[np.ndarray, " n"]
    index: Int64[np.ndarray, " n"]
    """At LOD0 the block."""

    @classmethod
    def of(
        cls, mode: Mode, budget: int, histories: Sequence[History], nodes: Iterable[tuple[int, int, int]]
    ) -> WorkingContext:
        """From nodes `(lod, index, source)` in any order."""
        rows = np.array(list(nodes), np.int64).reshape(-1, 3)
        return cls.of_arrays(mode, budget, histories, rows[:, 2], rows[:, 0], rows[:, 1])

    @classmethod
    def of_arrays(
        cls,
        mode: Mode,
        budget: int,
        histories: Sequence[History],
        source: np.ndarray,
        lod: np.ndarray,
        index: np.ndarray,
    ) -> WorkingContext:
        """From columns in any order; equal to `of`."""
        start = index * _sizes(lod)
        order = np.lexsort((-lod, start, source))
        return cls(
            mode,
            budget,
            tuple(histories),
            source[order].astype(np.int16),
            lod[order].astype(np.int8),
            index[order].astype(np.int64),
        )

    @classmethod
    def coarsest(cls, mode: Mode, budget: int, histories: Sequence[History]) -> WorkingContext:
        """The cheapest one there is: roots, and the tails as they are.

        Raises:
            BudgetError: the budget cannot hold it; the message names the smallest that can.
        """
        columns = [_coarsest_columns(number, history) for number, history in enumerate(histories)]
        source, lod, index = (np.concatenate(column) for column in zip(*columns, strict=True))
        return cls.of_arrays(mode, budget, histories, source, lod, index)

    def __post_init__(self) -> None:
        if not self.histories:
            raise FocusError("a Working Context needs a history, be it an empty one")
        if self.mode not in {"strict", "overlay"}:
            raise FocusError(f"there is no mode {self.mode!r}; use strict or overlay")
        for number, history in enumerate(self.histories):
            self._check(number, history)
        for number, history in enumerate(self.histories):
            if history.block_states is not None:
                self._check_states(number, history)
        if self.total_cost > self.budget:
            smallest = smallest_budget(self.histories)
            raise BudgetError(
                f"the Working Context costs {self.total_cost} and the budget is {self.budget}; the smallest budget "
                f"that can hold this history of {self.total_tokens:,} tokens is {smallest}"
            )

    def _check(self, number: int, history: History) -> None:
        mine = self.source == number
        lod, index = self.lod[mine].astype(np.int64), self.index[mine]
        start, stop = self.first_block[mine], self.stop_block[mine]
        where = f"version {history.seq} of context {history.context!r}"
        is_tail = (lod == 0) & (index == history.stop_block)
        if bool(is_tail.any()) != bool(history.tail_tokens) or is_tail.sum() > 1:
            raise FocusError(f"the tail of {where} must stand in the Working Context, once")
        node = ~is_tail
        counts = np.array([history.num_nodes(level) for level in range(128)])
        unknown = node & ((lod < 0) | (index < 0) | (index >= counts[np.clip(lod, 0, 127)]))
        outside = node & ((start < history.first_block) | (stop > history.stop_block))
        for wrong, what in ((unknown, "does not exist in"), (outside, "is outside the chosen part of")):
            if wrong.any():
                position = int(np.argmax(wrong))
                raise FocusError(f"node ({lod[position]}, {index[position]}) {what} {where}")
        start, stop = start[node], stop[node]
        if len(start) == 0:
            if history.num_blocks:
                raise FocusError(f"nothing represents blocks {history.first_block}-{history.stop_block} of {where}")
            return
        reached = np.maximum.accumulate(stop)
        gap = np.flatnonzero(start[1:] > reached[:-1])
        if start[0] > history.first_block or len(gap) or reached[-1] < history.stop_block:
            if start[0] > history.first_block:
                missing = history.first_block
            else:
                missing = int(reached[gap[0]]) if len(gap) else int(reached[-1])
            raise FocusError(f"nothing represents block {missing} of {where}")
        # Nodes are laminar: two that overlap are nested, or the same.
        same = (start[1:] == start[:-1]) & (lod[node][1:] == lod[node][:-1])
        overlap = start[1:] < reached[:-1]
        if same.any() or (self.mode == "strict" and overlap.any()):
            position = int(np.argmax(same)) if same.any() else int(np.argmax(overlap))
            raise FocusError(f"block {start[1:][position]} of {where} is shown twice")

    def _check_states(self, number: int, history: History) -> None:
        mine = self.source == number
        wrong = np.flatnonzero(mine & (self.lod == 0) & ~SHOWN_RAW[self.state])
        if len(wrong) == 0:
            wrong = self._below_tombstones(mine, history)
        if len(wrong):
            lod, index, state = (int(column[wrong[0]]) for column in (self.lod, self.index, self.state))
            raise FocusError(
                f"node ({lod}, {index}) of version {history.seq} of context {history.context!r} shows detail of what "
                f"is {EntryState(state).label}; show node {_stand_in(history, lod, index)} in its place"
            )

    def _below_tombstones(self, mine: np.ndarray, history: History) -> np.ndarray:
        """Positions of gists whose parent could stand for them and is tombstoned; one of siblings.

        Parents are enough: below a tombstoned node all are.
        """
        gists = np.flatnonzero(mine & (self.state == EntryState.TOMBSTONED))
        parents = np.stack([self.lod[gists] + 1, self.index[gists] // K], axis=1)
        parents, one_child = np.unique(parents, axis=0, return_index=True)
        return gists[one_child[[history.is_tombstoned(lod, index) for lod, index in parents.tolist()]]]

    # -- what the entries are ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Entries."""
        return len(self.lod)

    def nodes(self) -> list[Node]:
        """Names of the entries, in order."""
        columns = (self.lod.tolist(), self.index.tolist(), self.source.tolist())
        return [Node(*row) for row in zip(*columns, strict=True)]

    def same_entries(self, other: WorkingContext) -> bool:
        """Whether both show the same nodes."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("source", "lod", "index"))

    @cached_property
    def first_block(self) -> Int64[np.ndarray, " n"]:
        """Block each entry's span begins with."""
        return self.index * _sizes(self.lod)

    @cached_property
    def stop_block(self) -> Int64[np.ndarray, " n"]:
        """Block after each entry's span."""
        return self.first_block + _sizes(self.lod)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        first, count = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        offset = 0
        for number, history in enumerate(self.histories):
            mine = np.flatnonzero(self.source == number)
            before = history.tokens_before
            last = len(before) - 1
            start = np.clip(self.first_block[mine] - history.first_block, 0, last)
            stop = np.clip(self.stop_block[mine] - history.first_block, 0, last)
            first[mine] = before[start] - before[0] + offset
            count[mine] = before[stop] - before[start]
            tail = mine[(self.lod[mine] == 0) & (self.index[mine] == history.stop_block)]
            count[tail] = history.tail_tokens
            offset += history.num_tokens
        return first, count

    @property
    def first_token(self) -> Int64[np.ndarray, " n"]:
        """Real tokens before each entry's span, counted from the first history's beginning."""
        return self._spans[0]

    @property
    def num_tokens(self) -> Int64[np.ndarray, " n"]:
        """Real tokens of each entry's span."""
        return self._spans[1]

    @cached_property
    def mu(self) -> Int64[np.ndarray, " n"]:
        """Centre of each entry's span in half tokens."""
        return 2 * self.first_token + self.num_tokens - 1

    @cached_property
    def sigma(self) -> Float32[np.ndarray, " n"]:
        """Standard deviation of a token's place within each entry's span, in tokens: that of a uniform law."""
        return (np.sqrt((self.num_tokens.astype(np.float64) ** 2 - 1).clip(min=0) / 12)).astype(np.float32)

    @cached_property
    def cost(self) -> Int64[np.ndarray, " n"]:
        """Vectors the model reads for each entry: a block's real tokens, a gist's m."""
        vectors = np.array([history.vectors_per_node for history in self.histories], np.int64)[self.source]
        return np.where(self.lod == 0, self.num_tokens, vectors)

    @cached_property
    def state(self) -> Int8[np.ndarray, " n"]:
        """`EntryState` of each entry's node, as `History.states_between` says; the tail is whole."""
        state = np.zeros(len(self), np.int8)
        for number, history in enumerate(self.histories):
            if history.block_states is not None:
                mine = np.flatnonzero((self.source == number) & (self.first_block < history.stop_block))
                state[mine] = history.states_between(self.first_block[mine], self.stop_block[mine])
        return state

    @property
    def total_cost(self) -> int:
        """Never more than the budget."""
        return int(self.cost.sum())

    @property
    def total_tokens(self) -> int:
        """Real tokens represented."""
        return sum(history.num_tokens for history in self.histories)

    def raw_blocks(self, source: int = 0) -> Int64[np.ndarray, " blocks"]:
        """Blocks shown at LOD0, without the tail."""
        shown = (self.lod == 0) & (self.source == source)
        return self.index[shown & (self.index < self.histories[source].stop_block)]

    # -- edits ---------------------------------------------------------------------------------------------------

    def expand(self, node: Node) -> WorkingContext:
        """Show a node's children in its place: 32 nodes, or a block's raw tokens.

        Raises:
            FocusError: the node is no entry, is raw already, or its state lets no detail of it show.
            BudgetError: the result would cost too much.
        """
        if node.lod == 0:
            raise FocusError(f"{tuple(node)} is shown in full detail already")
        keep = self._without(node)
        children = [node.index] if node.lod == 1 else range(node.index * K, (node.index + 1) * K)
        # In an overlay some children may stand there already, or be shown raw.
        levels = {node.lod - 1, 0} if node.lod == 2 else {node.lod - 1}
        there = {n.index for n in self.nodes() if n.lod in levels and n.source == node.source}
        added = [Node(node.lod - 1, index, node.source) for index in children if index not in there]
        return self._edited(keep, added)

    def collapse(self, node: Node) -> WorkingContext:
        """Show a node in place of everything below it.

        Raises:
            FocusError: nothing below it is shown, or it does not exist.
        """
        if node.lod == 0:
            raise FocusError(f"{tuple(node)} is a block; there is nothing below it")
        size = blocks_per_node(node.lod)
        start, stop = node.index * size, (node.index + 1) * size
        below = (self.source == node.source) & (self.first_block >= start) & (self.stop_block <= stop)
        below &= (self.lod < node.lod) & (self.first_block < self.histories[node.source].stop_block)
        if not below.any():
            raise FocusError(f"nothing below {tuple(node)} is shown")
        keep = ~below & ~self._is(node)
        return self._edited(keep, [node])

    def show(self, nodes: Iterable[Node]) -> WorkingContext:
        """Overlay only: add nodes below what stands there.

        Raises:
            FocusError: in `strict` mode, a node is shown already or does not exist, or its state does not let it show.
            BudgetError: the result would cost too much.
        """
        self._require_overlay("show")
        return self._edited(np.ones(len(self), bool), list(nodes))

    def hide(self, nodes: Iterable[Node]) -> WorkingContext:
        """Overlay only: remove entries that something else represents as well.

        Raises:
            FocusError: in `strict` mode, no such entry, or nothing would represent its slots.
        """
        self._require_overlay("hide")
        keep = np.ones(len(self), bool)
        for node in nodes:
            keep &= self._without(node)
        return self._edited(keep, [])

    def with_budget(self, budget: int) -> WorkingContext:
        """The same entries under another budget."""
        return replace(self, budget=budget)

    def _require_overlay(self, what: str) -> None:
        if self.mode != "overlay":
            raise FocusError(f"{what} needs mode overlay; in a strict Working Context expand and collapse")

    def _is(self, node: Node) -> np.ndarray:
        return (self.lod == node.lod) & (self.index == node.index) & (self.source == node.source)

    def _without(self, node: Node) -> np.ndarray:
        found = self._is(node)
        if not found.any():
            raise FocusError(f"{tuple(node)} is no entry of this Working Context")
        return ~found

    def _edited(self, keep: np.ndarray, added: Sequence[Node]) -> WorkingContext:
        more = np.array([(n.source, n.lod, n.index) for n in added], np.int64).reshape(-1, 3)
        return WorkingContext.of_arrays(
            self.mode,
            self.budget,
            self.histories,
            np.concatenate([self.source[keep], more[:, 0]]),
            np.concatenate([self.lod[keep].astype(np.int64), more[:, 1]]),
            np.concatenate([self.index[keep], more[:, 2]]),
        )


def smallest_budget(histories: Sequence[History]) -> int:
    """The least that a legal Working Context of these histories costs."""
    return sum(len(h.roots()[0]) * h.vectors_per_node + h.tail_tokens for h in histories)


def _stand_in(history: History, lod: int, index: int) -> tuple[int, int]:
    """What shows no more of a node than its state allows: its gist, or the coarsest tombstoned node over it."""
    lod = max(lod, 1)
    while history.is_tombstoned(lod + 1, index // K):
        lod, index = lod + 1, index // K
    return lod, index


def _sizes(lod: np.ndarray) -> np.ndarray:
    """Blocks an entry of each level covers."""
    return K ** np.maximum(lod.astype(np.int64) - 1, 0)


def _coarsest_columns(number: int, history: History) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lod, index = history.roots()
    if history.tail_tokens:
        lod, index = np.append(lod, 0), np.append(index, history.stop_block)
    return np.full(len(lod), number, np.int64), lod.astype(np.int64), index.astype(np.int64)
