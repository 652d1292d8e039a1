"""Spending a budget: which detail a Working Context can still afford, in either mode.

Starts from the coarsest tiling and only ever adds detail, so that everything in between is legal. What the states of a
history do not let show (`EntryState`) is never shown: it is refused like what cannot be afforded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError
from models.focus.history import SHOWN_RAW, History, blocks_per_node
from models.focus.working_context import Mode, Node, WorkingContext, smallest_budget


class Filling:
    """A Working Context in the making.

    Raises:
        BudgetError: the budget cannot hold even the coarsest one; the message names the smallest that can.
    """

    def __init__(self, mode: Mode, budget: int, histories: Sequence[History]) -> None:
        self.mode: Mode = mode
        self.budget = budget
        self.histories = tuple(histories)
        smallest = smallest_budget(histories)
        if smallest > budget:
            num_tokens = sum(history.num_tokens for history in histories)
            raise BudgetError(
                f"a budget of {budget} cannot hold a history of {num_tokens:,} tokens; the smallest that can is "
                f"{smallest}"
            )
        self.spent = smallest
        self._tiling: set[Node] = set()
        for source, history in enumerate(histories):
            lods, indices = history.roots()
            pairs = zip(lods.tolist(), indices.tolist(), strict=True)
            self._tiling.update(Node(lod, index, source) for lod, index in pairs)
            if history.tail_tokens:
                self._tiling.add(Node(0, history.stop_block, source))
        self._shown: set[Node] = set()

    @property
    def room(self) -> int:
        """Budget that is left."""
        return self.budget - self.spent

    def is_shown(self, block: int, source: int = 0) -> bool:
        """Whether a block is raw already."""
        node = Node(0, block, source)
        return node in self._tiling or node in self._shown

    def price(self, block: int, source: int = 0, *, beside: bool = False) -> int:
        """What showing a block raw, as `show` does it, would add to the cost, whether or not its state lets it show."""
        return self._price(block, source, self._ancestors(block, source), beside)

    def _price(self, block: int, source: int, path: list[Node], beside: bool) -> int:
        m = self.histories[source].vectors_per_node
        if not path:
            return 0 if self.is_shown(block, source) else self._block_tokens(block, source)
        if self.mode == "overlay":
            replaced = m if path[-1].lod == 1 and not beside else 0
            return self._block_tokens(block, source) - replaced
        return (len(path) - 1) * (K - 1) * m + self._block_tokens(block, source) - m

    def show(self, block: int, source: int = 0, *, beside: bool = False) -> bool:
        """Show a block raw if its state lets it show and it can be afforded; False when not.

        With `beside`, in `overlay`, its own gist stays: where the block stands elsewhere than in the timeline, rows
        there do not change when it comes and goes.
        """
        if self.is_shown(block, source):
            if not beside:
                self._give_up_gist(block, source)
            return True
        if not self.histories[source].shows_raw(block):
            return False
        path = self._ancestors(block, source)
        price = self._price(block, source, path, beside)
        if price > self.room:
            return False
        node = Node(0, block, source)
        if self.mode == "overlay" and (path[-1].lod > 1 or beside):
            self._shown.add(node)
        else:
            for ancestor in path:
                self._split(ancestor)
        self.spent += price
        return True

    def _give_up_gist(self, block: int, source: int) -> None:
        """Of a block that was shown beside it."""
        raw, gist = Node(0, block, source), Node(1, block, source)
        if raw in self._shown and gist in self._tiling:
            self._shown.discard(raw)
            self._split(gist)
            self.spent -= self.histories[source].vectors_per_node

    def expand(self, node: Node) -> bool:
        """Replace an entry of the tiling by its children if `may_expand` and that can be afforded; False when not."""
        if not self.may_expand(node):
            return False
        history = self.histories[node.source]
        m = history.vectors_per_node
        price = (K - 1) * m if node.lod > 1 else self._block_tokens(node.index, node.source) - m
        if node.lod == 2:
            # A child that is shown raw beside its grandparent needs no gist.
            children = (Node(0, node.index * K + i, node.source) for i in range(K))
            price -= m * sum(child in self._shown for child in children)
        if price > self.room:
            return False
        self._split(node)
        self.spent += price
        return True

    def may_expand(self, node: Node) -> bool:
        """Whether states let detail of a gist show: a block's raw tokens, or gists below what is not tombstoned."""
        history = self.histories[node.source]
        return history.shows_raw(node.index) if node.lod == 1 else not history.is_tombstoned(node.lod, node.index)

    def entries(self, source: int = 0) -> list[Node]:
        """Gists of the tiling, newest last."""
        mine = [node for node in self._tiling if node.source == source and node.lod > 0]
        return sorted(mine, key=lambda node: node.index * blocks_per_node(node.lod))

    def finish(self) -> WorkingContext:
        """The Working Context."""
        return WorkingContext.of(self.mode, self.budget, self.histories, self._tiling | self._shown)

    def _block_tokens(self, block: int, source: int) -> int:
        history = self.histories[source]
        before = history.tokens_before
        offset = block - history.first_block
        return int(before[offset + 1] - before[offset])

    def _ancestors(self, block: int, source: int) -> list[Node]:
        """In `strict`: the nodes that must be split to show a block, from the top. In `overlay`: the entry over it.

        Empty when the block is raw.
        """
        path: list[Node] = []
        for lod in range(1, self.histories[source].max_lod + 1):
            node = Node(lod, block // blocks_per_node(lod), source)
            path.append(node)
            if node in self._tiling:
                return [node] if self.mode == "overlay" else path[::-1]
        return []

    def _split(self, node: Node) -> None:
        self._tiling.discard(node)
        if node.lod == 1:
            self._tiling.add(Node(0, node.index, node.source))
            return
        for index in range(node.index * K, (node.index + 1) * K):
            raw = Node(0, index, node.source)
            if node.lod == 2 and raw in self._shown:
                self._shown.discard(raw)
                self._tiling.add(raw)
            else:
                self._tiling.add(Node(node.lod - 1, index, node.source))


def show_newest(filling: Filling, num_tokens: int | None = None, source: int = -1) -> int:
    """Show a history's newest blocks raw, up to so many tokens or as many as fit; returns the tokens shown.

    Blocks whose state does not let them show are passed over, and older ones behind them shown instead: a hole of
    pruned blocks must not cost the reader what came just before it.
    """
    source = source % len(filling.histories)
    history = filling.histories[source]
    shown = history.tail_tokens
    before = history.tokens_before
    for block in _newest_first(history):
        size = int(before[block + 1 - history.first_block] - before[block - history.first_block])
        if num_tokens is not None and shown + size > num_tokens:
            break
        if not filling.show(block, source):
            break
        shown += size
    return shown


def show_ranked(filling: Filling, blocks: Iterable[tuple[int, int]], limit: int | None = None) -> list[tuple[int, int]]:
    """Show blocks `(block, source)` raw in their order as far as they fit, at most `limit`; those now shown.

    A block that is raw already counts as nothing and is passed over; so is one that does not fit or may not be shown.
    """
    shown: list[tuple[int, int]] = []
    for block, source in blocks:
        if limit is not None and len(shown) >= limit:
            break
        if not filling.is_shown(block, source) and filling.show(block, source):
            shown.append((block, source))
    return shown


def expand_evenly(filling: Filling) -> None:
    """Expand the coarsest entries first, the newest of a level first, as long as the next one fits.

    Entries that may not be expanded stay as they are, and finer ones are expanded all the same.
    """
    while True:
        entries = [node for source in range(len(filling.histories)) for node in _expandable(filling, source)]
        if not entries:
            return
        coarsest = max(node.lod for node in entries)
        level = [node for node in entries if node.lod == coarsest]
        for node in reversed(level):
            if not filling.expand(node):
                return


def _newest_first(history: History) -> Iterable[int]:
    """Blocks of a history that may be shown raw, from the newest back."""
    if history.block_states is None:
        return range(history.stop_block - 1, history.first_block - 1, -1)
    return (history.first_block + np.flatnonzero(SHOWN_RAW[history.block_states])[::-1]).tolist()


def _expandable(filling: Filling, source: int) -> list[Node]:
    entries = filling.entries(source)
    if filling.histories[source].block_states is None:
        return entries
    return [node for node in entries if filling.may_expand(node)]
