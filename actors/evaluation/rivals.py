"""The rivals of focus, at exactly equal slots: who chooses blocks, and in which form the choice is shown.

A condition is `chooser/form`. Forms: `raw` shows chosen blocks and the raw tail alone, `overlay` and `strict` are
Working Contexts whose gists stand in for everything else. `none`, `full` and `recency/raw` have no gists either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from actors.evaluation.contents import Contents, Reading
from cluster.errors import ConfigError
from models.focus.allocators import FocusRequest, Ranked, RankedBlocks, Recency, Uniform
from models.focus.filling import Filling, show_newest
from models.focus.working_context import Mode, WorkingContext

NONE, FULL = "none", "full"
RECENCY, UNIFORM, RANDOM = "recency", "uniform", "random"
BM25, DENSE, FUSION, RERANK = "bm25", "dense", "fusion", "rerank"
ORACLE_GREEDY, ORACLE = "oracle_greedy", "oracle"

RETRIEVERS = (RANDOM, BM25, DENSE, FUSION, RERANK)
"""Choosers that look at the history and the tail, but not at the horizon."""
ORACLES = (ORACLE_GREEDY, ORACLE)
CHOOSERS = (RECENCY, UNIFORM, *RETRIEVERS, *ORACLES)
FORMS = ("raw", "overlay", "strict")


@dataclass(frozen=True)
class Condition:
    """One thing to put before the horizon, within a budget."""

    chooser: str
    form: str = ""
    """Empty for `none` and `full`, which have no budget."""

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"{self.chooser}/{self.form}" if self.form else self.chooser


def conditions(choosers: Sequence[str], forms: Sequence[str]) -> list[Condition]:
    """Every chooser in every form it has.

    Raises:
        ConfigError: an unknown chooser or form; the message lists the valid ones.
    """
    for given, valid, what in ((choosers, (*CHOOSERS, NONE, FULL), "rival"), (forms, FORMS, "form")):
        if unknown := [name for name in given if name not in valid]:
            raise ConfigError(f"there is no {what} {unknown[0]!r}; there are: {', '.join(valid)}")
    found: list[Condition] = []
    for chooser in choosers:
        if chooser in {NONE, FULL}:
            found.append(Condition(chooser))
        else:
            # Without gists nothing but raw tokens can be shown evenly.
            found += [Condition(chooser, form) for form in forms if not (chooser == UNIFORM and form == "raw")]
    return found


def contents_of(
    condition: Condition, reading: Reading, ranked: RankedBlocks, budget: int, tail_tokens: int, max_blocks: int
) -> tuple[Contents, list[int]]:
    """Rows of a condition, never more than the budget, and the blocks of `ranked` it shows.

    Raises:
        BudgetError: the budget cannot hold a Working Context of the history.
    """
    history = reading.history
    if condition.chooser == NONE:
        return reading.nothing(), []
    if condition.chooser == FULL:
        return reading.raw(range(history.first_block, history.stop_block)), []
    chosen = ranked if condition.chooser not in {RECENCY, UNIFORM} else ()
    if condition.form == "raw":
        return _raw(reading, chosen, budget, tail_tokens, max_blocks)
    wc = working_context(condition, reading, chosen, budget, tail_tokens, max_blocks)
    raw = set(wc.raw_blocks().tolist())
    return reading.context(wc), [block for block, _ in chosen if block in raw]


def working_context(
    condition: Condition, reading: Reading, ranked: RankedBlocks, budget: int, tail_tokens: int, max_blocks: int
) -> WorkingContext:
    """The Working Context of a condition that has one."""
    request = FocusRequest([reading.history], budget, cast(Mode, condition.form), ranked)
    if condition.chooser == RECENCY:
        return Recency().allocate(request)
    if condition.chooser == UNIFORM:
        return Uniform(tail_tokens).allocate(request)
    return Ranked(tail_tokens, max_blocks).allocate(request)


def bare_context(reading: Reading, mode: Mode, budget: int, tail_tokens: int) -> WorkingContext:
    """Stand-ins and the raw tail alone: what choosers add to."""
    filling = Filling(mode, budget, [reading.history])
    show_newest(filling, tail_tokens)
    return filling.finish()


def _raw(
    reading: Reading, ranked: RankedBlocks, budget: int, tail_tokens: int, max_blocks: int
) -> tuple[Contents, list[int]]:
    """Chosen blocks and the newest tokens, filling the budget exactly where the history is long enough."""
    history = reading.history
    sizes = np.diff(history.tokens_before)
    room = budget - min(tail_tokens, budget)
    picked: list[int] = []
    for block, _ in ranked:
        size = int(sizes[block - history.first_block])
        if len(picked) < max_blocks and size <= room and block not in picked:
            picked.append(block)
            room -= size
    left = budget - sum(int(sizes[block - history.first_block]) for block in picked)
    newest: list[int] = []
    block = history.stop_block - 1
    while left > 0 and block >= history.first_block:
        if block not in picked:
            newest.append(block)
            left -= int(sizes[block - history.first_block])
        block -= 1
    rows = reading.raw([*picked, *newest])
    if left < 0:
        # The oldest block of the tail is cut, so that the slots are equal to the last one.
        cut = reading.raw([newest[-1]])
        first = int(np.flatnonzero(rows.half_tokens == cut.half_tokens[0])[0])
        rows = Contents.joined([rows.rows(0, first), rows.rows(first - left, rows.num_rows)])
    return rows, picked
