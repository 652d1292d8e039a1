"""The Focus Allocator of a session: from the Working Context before to the next one, by scores, at the least edits.

Beside the coarsest gists of everything it shows, in this order: what is pinned, a raw tail of the newest tokens, the
blocks whose scores say so, and more of the tail. Three things keep it calm. A block that is shown has a bonus over
others (hysteresis); one that was given up waits before it comes back by itself; and edits must gain more than reading
again costs what stands behind them. New tokens age the tail in batches, so that not every refocus reads it again.

A pure function of its arguments: whatever comes out is a legal Working Context within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import FocusError
from models.focus.filling import Filling
from models.focus.history import History, blocks_per_node
from models.focus.selection import Candidates, Strategy, select
from models.focus.working_context import Mode, WorkingContext

BlockName = tuple[int, int]
"""`(block, source)`."""


@dataclass(frozen=True)
class RefocusPolicy:
    """How calm, and how much of what. Rows are tokens here: a block costs its tokens."""

    mode: Mode
    strategy: Strategy | Literal["recency"]
    tail_tokens: int
    """Newest tokens that stay raw before anything found is shown."""
    max_blocks: int
    """Blocks shown by their scores."""
    age_tokens: int
    """Tokens by which the tail gives way at a time."""
    keep_bonus: float
    """What a block that is shown already has over others, in units of score."""
    cooldown: int
    """Refocuses before a block that was given up may come back by itself."""
    row_price: float
    """Of a row read again, in units of score."""
    exploration: float
    """Scale of the noise of `stochastic`."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            FocusError: naming the values.
        """
        if min(self.tail_tokens, self.max_blocks, self.cooldown) < 0 or self.age_tokens < 1:
            raise FocusError(f"a refocus policy needs sizes of 0 or more and an age_tokens of 1 or more: {self}")
        if min(self.keep_bonus, self.row_price, self.exploration) < 0:
            raise FocusError(f"a refocus policy needs bonus, price and noise of 0 or more: {self}")


@dataclass(frozen=True, eq=False)
class Focus:
    """A Working Context, and what the next refocus must know about it."""

    wc: WorkingContext
    tail_from: int
    """First block of the raw tail, in the last history."""
    found: tuple[BlockName, ...] = ()
    """Blocks shown for their scores."""
    pinned: tuple[BlockName, ...] = ()
    """Pinned blocks that fit."""
    number: int = 0
    """Refocuses so far."""
    since: Mapping[BlockName, int] = field(default_factory=dict)
    """By found block the refocus that showed it."""
    given_up: Mapping[BlockName, int] = field(default_factory=dict)
    """By block that was shown and is no longer, as long as that matters, the refocus that gave it up."""
    added: tuple[BlockName, ...] = ()
    """Blocks this refocus began to show by choice."""
    dropped: tuple[BlockName, ...] = ()
    """Blocks it gave up by choice."""
    num_aged: int = 0
    """Blocks of the tail that gave way to newer ones."""
    unfit: tuple[BlockName, ...] = ()
    """Pinned blocks that did not fit."""


def refocus(
    policy: RefocusPolicy,
    histories: Sequence[History],
    budget: int,
    scores: Mapping[BlockName, float],
    previous: Focus | None = None,
    *,
    pinned: Sequence[BlockName] = (),
    new_question: bool = False,
    rows_behind_found: int | None = None,
    seed: int = 0,
) -> Focus:
    """The next Working Context.

    Args:
        policy: how it is chosen.
        histories: what it represents; the last one grows, and has the raw tail.
        budget: W_max, less what is kept free for tokens decoded until the next refocus.
        scores: by block what showing it is worth; blocks that are shown and not scored are worth 0.
        previous: the focus before; None for the first, and where histories changed by more than growth.
        pinned: shown in any case, in this order, as far as they fit.
        new_question: what was given up may come back at once.
        rows_behind_found: where found blocks stand together (`layout.found_before_turn`): rows from the first of them
            on, which are read again when one of them changes or a new question follows; 0 where there are none yet.
            Their gists stay in their place. None: found blocks stand in the timeline.
        seed: of `stochastic`; with the refocus' number.

    Raises:
        BudgetError: the budget cannot hold the histories; the message names the smallest that can.
    """
    number = 0 if previous is None else previous.number + 1
    together = rows_behind_found is not None
    filling = Filling(policy.mode, budget, histories)
    unfit = tuple(block for block in pinned if not filling.show(*block))
    tail = _Tail(filling, policy, None if previous is None else previous.tail_from)
    tail.show_least()

    rows = None if previous is None else _Rows(previous.wc)
    found_before = () if previous is None else tuple(block for block in previous.found if not filling.is_shown(*block))
    given_up = {} if previous is None else dict(previous.given_up)
    chosen: tuple[BlockName, ...] = ()
    if policy.strategy != "recency" and policy.max_blocks:
        waiting = set() if new_question else {b for b, at in given_up.items() if number - at <= policy.cooldown}
        behind = _behind(rows, rows_behind_found)
        items = _items(filling, policy, scores, found_before, waiting, tail.start, behind, together)
        room = min(policy.max_blocks * K, filling.room)
        held_cost = int(items.cost[items.shown].sum())
        forced = 0
        if rows is not None:
            forced = rows.behind_changed_roots(histories, tail.start)
            if tail.price() + held_cost > filling.room:
                forced = max(forced, rows.behind(tail.source, tail.start))
        if new_question and together:
            forced = max(forced, rows_behind_found)
        selection = select(
            items,
            room,
            row_price=policy.row_price,
            forced_rows=forced,
            strategy=policy.strategy,
            exploration=policy.exploration,
            rng=np.random.default_rng([seed, number]),
        )
        for position in selection.chosen[np.argsort(-items.score[selection.chosen], kind="stable")]:
            filling.show(int(items.block[position]), int(items.source[position]), beside=together)
        picked = items.part(selection.chosen)
        names = zip(picked.block.tolist(), picked.source.tolist(), strict=True)
        chosen = tuple(name for name in names if filling.is_shown(*name))

    added = tuple(block for block in chosen if block not in found_before)
    dropped = tuple(block for block in found_before if block not in chosen)
    # More of the tail costs nothing where it is read again anyway.
    edited_before = not together and bool(added or dropped)
    num_aged = tail.fill(edited=previous is None or edited_before)
    own = tail.source
    # What the tail reached is no longer there for its score.
    found = tuple(block for block in chosen if not (block[1] == own and block[0] >= tail.start))
    given_up.update(dict.fromkeys(dropped, number))
    before = {} if previous is None else previous.since
    return Focus(
        filling.finish(),
        tail.start,
        found,
        tuple(block for block in pinned if block not in unfit),
        number,
        {block: before.get(block, number) for block in found},
        {block: at for block, at in given_up.items() if number - at <= policy.cooldown},
        added,
        dropped,
        num_aged,
        unfit,
    )


def _items(
    filling: Filling,
    policy: RefocusPolicy,
    scores: Mapping[BlockName, float],
    found_before: Sequence[BlockName],
    waiting: set[BlockName],
    tail_from: int,
    behind: Callable[[int, int], int],
    beside: bool,
) -> Candidates:
    """Blocks to choose among: those shown, and those scored that may come."""
    shown = set(found_before)
    rows: list[tuple[int, int, float, int, int, bool]] = []
    last = len(filling.histories) - 1
    for block, source in shown | {name for name, score in scores.items() if score > 0}:
        history = filling.histories[source]
        name = (block, source)
        if not history.first_block <= block < history.stop_block or not history.shows_raw(block):
            continue
        in_tail = source == last and block >= tail_from
        if filling.is_shown(block, source) or in_tail or (name in waiting and name not in shown):
            continue
        bonus = policy.keep_bonus if name in shown else 0.0
        price = max(1, filling.price(block, source, beside=beside))
        rows_behind = behind(source, block)
        rows.append((block, source, scores.get(name, 0.0) + bonus, price, rows_behind, name in shown))
    return Candidates.of(rows)


def _behind(rows: _Rows | None, rows_behind_found: int | None) -> Callable[[int, int], int]:
    """Rows read again where a block `(source, block)` is shown or given up."""
    if rows is None:
        return lambda source, block: 0
    if rows_behind_found is not None:
        return lambda source, block: rows_behind_found
    return rows.behind


class _Tail:
    """The raw tail of the last history: from `start` to its end."""

    def __init__(self, filling: Filling, policy: RefocusPolicy, start: int | None) -> None:
        self._filling = filling
        self._policy = policy
        self.source = len(filling.histories) - 1
        self._history = filling.histories[-1]
        self._began = None if start is None else min(max(start, self._history.first_block), self._history.stop_block)
        self.start = self._history.stop_block if self._began is None else self._began

    def show_least(self) -> None:
        """The newest blocks, as many as stay raw before anything found is shown."""
        shown = self._history.tail_tokens
        for block in range(self._history.stop_block - 1, self._history.first_block - 1, -1):
            shown += self._tokens(block)
            if shown > self._policy.tail_tokens or not self._show(block):
                break
            if self._began is None:
                self.start = block

    def price(self) -> int:
        """What the tail would still cost as it was."""
        blocks = range(self.start, self._history.stop_block)
        return sum(self._filling.price(block, self.source) for block in blocks if not self._is_shown(block))

    def fill(self, *, edited: bool) -> int:
        """Show the tail as it was, or less of it where it does not fit, or more where it is read again anyway.

        Returns:
            Blocks that gave way.
        """
        filling, history = self._filling, self._history
        spare = self._policy.age_tokens
        began = self.start if self._began is None else self._began
        aged = 0
        if self.price() > filling.room:
            # The newest that fit, and room for what comes next.
            edited = True
            block = history.stop_block
            while block > began and (self._is_shown(block - 1) or self._price(block - 1) <= filling.room - spare):
                if not self._show(block - 1):
                    break
                block -= 1
            aged, self.start = block - began, block
        else:
            for block in range(history.stop_block - 1, self.start - 1, -1):
                self._show(block)
        if edited and not aged:
            while self.start > history.first_block:
                block = self.start - 1
                if not self._is_shown(block) and self._price(block) > filling.room - spare:
                    break
                if not self._show(block):
                    break
                self.start = block
        return aged

    def _tokens(self, block: int) -> int:
        before, offset = self._history.tokens_before, block - self._history.first_block
        return int(before[offset + 1] - before[offset])

    def _price(self, block: int) -> int:
        return self._filling.price(block, self.source)

    def _is_shown(self, block: int) -> bool:
        return self._filling.is_shown(block, self.source)

    def _show(self, block: int) -> bool:
        # What may not be shown raw is passed over.
        return not self._history.shows_raw(block) or self._filling.show(block, self.source)


class _Rows:
    """Rows of a Working Context by where they stand."""

    def __init__(self, wc: WorkingContext) -> None:
        self._wc = wc
        self._places = _place(wc.source.astype(np.int64), wc.first_block)
        self._before = np.concatenate([[0], np.cumsum(wc.cost)])

    def behind(self, source: int, block: int) -> int:
        """Rows from the first entry on that begins at or behind a block."""
        entry = np.searchsorted(self._places, _place(np.int64(source), np.int64(block)))
        return int(self._before[-1] - self._before[entry])

    def behind_changed_roots(self, histories: Sequence[History], tail_from: int) -> int:
        """Rows from the first gist on that others stand for now, before the tail."""
        if len(histories) != len(self._wc.histories):
            return int(self._before[-1])
        for source, (old, new) in enumerate(zip(self._wc.histories, histories, strict=True)):
            if old.level_counts == new.level_counts:
                continue
            ends = tail_from if source == len(histories) - 1 else new.stop_block
            first = _first_difference(old, new)
            if first is not None and first < ends:
                return self.behind(source, first)
        return 0


def _place(source: np.ndarray | np.int64, block: np.ndarray | np.int64) -> np.ndarray | np.int64:
    return (source << 48) | block


def _first_difference(old: History, new: History) -> int | None:
    """The first block whose root is another one."""
    (old_lod, old_index), (new_lod, new_index) = old.roots(), new.roots()
    shared = min(len(old_lod), len(new_lod))
    differs = np.flatnonzero((old_lod[:shared] != new_lod[:shared]) | (old_index[:shared] != new_index[:shared]))
    if len(differs):
        at = int(differs[0])
        return int(new_index[at]) * blocks_per_node(int(new_lod[at]))
    return None if len(new_lod) >= len(old_lod) else int(new.stop_block)
