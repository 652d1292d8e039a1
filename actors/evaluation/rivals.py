"""The rivals of focus, at exactly equal slots: who chooses blocks, and in which form the choice is shown.

A condition is `chooser/form`, with `@policy` behind it where its rows stand elsewhere than by the evaluation's position
policy. Forms: `raw` shows chosen blocks and the raw tail alone; `late` the same with chosen blocks behind the tail,
`late_ranked` with the best of them last, `late64` before its newest 64 tokens (all with `compact`: under `global` rows
would stand before those they are read after); `overlay` and `strict` are Working Contexts whose gists stand in for
everything else, `constant` is an overlay whose gists all say the same. `none`, `full`, `needles` and `recency/raw` have
no gists either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.evaluation.contents import Contents, Reading
from cluster.errors import ConfigError
from models.focus.allocators import FocusRequest, Ranked, RankedBlocks, Recency, Uniform
from models.focus.filling import Filling, show_newest
from models.focus.history import History
from models.focus.layout import POLICIES, runs_of_neighbours
from models.focus.working_context import Mode, WorkingContext

NONE, FULL, NEEDLES = "none", "full", "needles"
RECENCY, UNIFORM, RANDOM = "recency", "uniform", "random"
BM25, DENSE, MINILM, FUSION, RERANK = "bm25", "dense", "minilm", "fusion", "rerank"
LENSNET = "lensnet"
ORACLE_GREEDY, ORACLE, EXHAUSTIVE = "oracle_greedy", "oracle", "exhaustive"

SEARCHERS = (BM25, DENSE, MINILM)
"""Choosers that search the history; what `fusion` can be made of."""
RETRIEVERS = (RANDOM, *SEARCHERS, FUSION, RERANK, LENSNET)
"""Choosers that look at the history and the tail, but not at the horizon."""
ORACLES = (ORACLE_GREEDY, ORACLE)
"""They measure a shortlist."""
MEASURING = (*ORACLES, EXHAUSTIVE)
"""They measure what the horizon gains, and so may know how many blocks are worth showing."""
CHOOSERS = (RECENCY, UNIFORM, *RETRIEVERS, *MEASURING)
LATE = {"late": 0, "late_ranked": 0, "late64": 64}
"""Forms by how many of the newest tokens stand behind what was chosen."""
RAW_FORMS = ("raw", *LATE)
FORMS = (*RAW_FORMS, "overlay", "strict", "constant")
WITHOUT_FORM = (NONE, FULL, NEEDLES)
"""They have no budget. `needles`: what a task's answer depends on and the tail, nothing else."""
TASK_CHOOSERS = (NONE, FULL, NEEDLES, RECENCY, UNIFORM, RANDOM, *SEARCHERS, FUSION, LENSNET, ORACLE)
"""Rivals on tasks."""
TASK_FORMS = (*RAW_FORMS, "overlay", "strict")


@dataclass(frozen=True)
class Condition:
    """One thing to put before the horizon, within a budget."""

    chooser: str
    form: str = ""
    """Empty for those `WITHOUT_FORM`."""
    policy: str = ""
    """Position policy; empty: the evaluation's."""

    @property
    def name(self) -> str:
        """As it stands in reports."""
        name = f"{self.chooser}/{self.form}" if self.form else self.chooser
        return f"{name}@{self.policy}" if self.policy else name

    @property
    def mode(self) -> Mode:
        """Mode of the Working Context of a form that is one."""
        return "strict" if self.form == "strict" else "overlay"


def conditions(
    rivals: Sequence[str],
    forms: Sequence[str],
    known: Sequence[str] = (*CHOOSERS, NONE, FULL),
    known_forms: Sequence[str] = FORMS,
) -> list[Condition]:
    """What is compared, each once.

    Args:
        rivals: choosers, each in all of `forms`; or `chooser/form`, `chooser/form@policy`: just that.
        forms: in which choosers without a form of their own are shown.
        known, known_forms: those there are.

    Raises:
        ConfigError: an unknown chooser, form or policy (the message lists the valid ones), or nothing to compare.
    """
    found: list[Condition] = []
    _require_known("form", forms, known_forms)
    for rival in rivals:
        name, at, policy = rival.partition("@")
        chooser, slash, form = name.partition("/")
        _require_known("rival", [chooser], known)
        _require_known("form", [form] if slash else [], known_forms)
        _require_known("position policy", [policy] if at else [], POLICIES)
        if chooser in WITHOUT_FORM:
            if form or policy:
                raise ConfigError(f"rival {chooser!r} has neither forms nor policies; write {chooser!r}")
            found.append(Condition(chooser))
            continue
        # Without gists nothing but raw tokens can be shown evenly.
        shown = [f for f in ([form] if form else forms) if not (chooser == UNIFORM and f in RAW_FORMS)]
        found += [Condition(chooser, f, policy) for f in shown]
    if not found:
        raise ConfigError(f"rivals {list(rivals)} in forms {list(forms)} leave nothing to compare")
    return list(dict.fromkeys(found))


def _require_known(what: str, given: Sequence[str], valid: Sequence[str]) -> None:
    if unknown := [name for name in given if name not in valid]:
        raise ConfigError(f"there is no {what} {unknown[0]!r}; there are: {', '.join(valid)}")


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
    if condition.form in RAW_FORMS:
        newest_last = LATE.get(condition.form)
        ranked_order = condition.form == "late_ranked"
        return _raw(reading, chosen, budget, tail_tokens, max_blocks, newest_last, ranked_order)
    wc = working_context(condition, history, chosen, budget, tail_tokens, max_blocks)
    # Found blocks may be raw for being recent, too: only as many as could be chosen were.
    raw = set(wc.raw_blocks().tolist())
    shown = reading.context(wc, same_gists=condition.form == "constant")
    return shown, [block for block, _ in chosen if block in raw][:max_blocks]


def working_context(
    condition: Condition, history: History, ranked: RankedBlocks, budget: int, tail_tokens: int, max_blocks: int
) -> WorkingContext:
    """The Working Context of a condition that has one."""
    request = FocusRequest([history], budget, condition.mode, ranked)
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


def bare_rows(reading: Reading, budget: int, tail_tokens: int) -> tuple[Contents, Contents]:
    """The gists of a Working Context without choices, and its raw tail."""
    wc = bare_context(reading, "overlay", budget, tail_tokens)
    rows = reading.context(wc)
    raw = np.flatnonzero(wc.lod == 0)
    num_gists = int(wc.cost[: int(raw[0])].sum()) if len(raw) else rows.num_rows
    return rows.rows(0, num_gists), rows.rows(num_gists, rows.num_rows)


def tail_blocks(reading: Reading, tail_tokens: int) -> list[int]:
    """The newest whole blocks that hold at most so many tokens."""
    history = reading.history
    left = history.tokens_before[-1] - history.tokens_before
    return list(range(history.first_block + int(np.argmax(left <= tail_tokens)), history.stop_block))


def _raw(
    reading: Reading,
    ranked: RankedBlocks,
    budget: int,
    tail_tokens: int,
    max_blocks: int,
    newest_last: int | None = None,
    best_last: bool = False,
) -> tuple[Contents, list[int]]:
    """Chosen blocks and the newest tokens, filling the budget exactly where the history is long enough.

    In timeline order, or with the chosen before so many of the newest tokens, themselves in timeline order or with the
    best last; neighbours stay together.
    """
    history = reading.history
    sizes = np.diff(history.tokens_before)
    room = budget - min(tail_tokens, budget)
    picked: list[int] = []
    for block, _ in ranked:
        size = int(sizes[block - history.first_block])
        if len(picked) < max_blocks and size <= room and block not in picked and history.shows_raw(block):
            picked.append(block)
            room -= size
    left = budget - sum(int(sizes[block - history.first_block]) for block in picked)
    newest: list[int] = []
    block = history.stop_block - 1
    while left > 0 and block >= history.first_block:
        if block not in picked and history.shows_raw(block):
            newest.append(block)
            left -= int(sizes[block - history.first_block])
        block -= 1
    # The oldest block of the tail is cut, so that the slots are equal to the last one.
    tail = reading.raw(newest)
    tail = tail.rows(max(0, -left), tail.num_rows)
    found = reading.raw(picked)
    if best_last and picked:
        runs = runs_of_neighbours([(block, 0) for block in picked])
        found = Contents.joined([reading.raw([block for block, _ in run]) for run in runs[::-1]])
    if newest_last is None:
        rows = Contents.joined([found, tail])
        return rows.ordered(np.argsort(rows.half_tokens)), picked
    older = max(0, tail.num_rows - newest_last)
    return Contents.joined([tail.rows(0, older), found, tail.rows(older, tail.num_rows)]), picked
