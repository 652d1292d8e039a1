"""Equal slots: no condition shows more than the budget, the raw ones exactly that, and each what it chose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Reading
from actors.evaluation.rivals import (
    BM25,
    CHOOSERS,
    FORMS,
    FULL,
    NONE,
    RECENCY,
    UNIFORM,
    Condition,
    bare_context,
    conditions,
    contents_of,
)
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError, ConfigError
from models.base_lm import BaseLM
from models.focus.working_context import Mode, smallest_budget
from tests.actors.evaluation.support import random_tree, reading_of


def block_tokens(reading: Reading) -> dict[int, int]:
    history = reading.history
    return {
        block: int(reading.reader.tokens(block, 1)[1][0]) for block in range(history.first_block, history.stop_block)
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, int, int, int]:
    """Document lengths with many short blocks, the range of the history, budget, tail, blocks."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(41, 900)), min_size=1, max_size=8))
    num_blocks = sum(-(-length // K) for length in lengths)
    first = draw(st.integers(0, num_blocks - 1))
    stop = draw(st.integers(first + 1, num_blocks))
    budget = draw(st.integers(40, 700))
    return lengths, first, stop, budget, draw(st.integers(1, 12)) * K, draw(st.integers(0, 10))


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_slots_never_exceed_the_budget(
    lm: BaseLM, case: tuple[list[int], int, int, int, int, int], data: st.DataObject
) -> None:
    lengths, first, stop, budget, tail, max_blocks = case
    reading = reading_of(lm, random_tree(lengths), first, stop)
    sizes = block_tokens(reading)
    ranked = [(block, 0) for block in data.draw(st.permutations(list(sizes)))]
    fits = smallest_budget([reading.history]) <= budget
    for condition in conditions((RECENCY, UNIFORM, BM25), FORMS):
        if condition.form != "raw" and not fits:
            with pytest.raises(BudgetError):
                contents_of(condition, reading, ranked, budget, tail, max_blocks)
            continue
        rows, picked = contents_of(condition, reading, ranked, budget, tail, max_blocks)
        assert rows.num_rows == len(rows.half_tokens) <= budget, condition
        assert len(picked) <= max_blocks
        if condition.form == "raw":
            assert rows.num_rows == min(budget, sum(sizes.values())), condition
            assert np.all(np.diff(rows.half_tokens) > 0), condition
        if condition.chooser in {RECENCY, UNIFORM}:
            assert picked == []
        before = reading.history.tokens_before
        shown = set((rows.half_tokens // 2).tolist())
        for block in picked:
            start = int(before[block - first] - before[0])
            assert shown >= set(range(start, start + sizes[block])), condition


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_raw_tail_is_shown_whoever_chooses(
    lm: BaseLM, case: tuple[list[int], int, int, int, int, int], data: st.DataObject
) -> None:
    lengths, first, stop, budget, tail, max_blocks = case
    reading = reading_of(lm, random_tree(lengths), first, stop)
    ranked = [(block, 0) for block in data.draw(st.permutations(range(first, stop)))]
    rows, _ = contents_of(Condition(BM25, "raw"), reading, ranked, budget, tail, max_blocks)
    num_tokens = reading.history.num_tokens
    newest = min(tail, budget, num_tokens)
    assert rows.half_tokens[-newest:].tolist() == [2 * t for t in range(num_tokens - newest, num_tokens)]


def test_the_raw_form_is_the_picks_and_the_newest_tokens(lm: BaseLM) -> None:
    # Blocks of 32 × 6, 8 | 32 × 4; tokens 0-191, 192-199 | 200-327.
    reading = reading_of(lm, random_tree([200, 128]))
    rows, picked = contents_of(Condition(BM25, "raw"), reading, [(6, 0), (1, 0), (1, 0), (2, 0), (3, 0)], 170, 64, 3)
    assert picked == [6, 1, 2]
    # 72 tokens picked; of the 98 left, 64 are blocks 10 and 9, block 8 is whole, and 2 tokens of block 7 are left.
    expected = [*range(32, 96), *range(192, 200), *range(230, 328)]
    assert rows.half_tokens.tolist() == [2 * t for t in expected]
    ids = np.concatenate([reading.ids(0, 7), reading.ids(7, 4)])[expected]
    assert torch.equal(rows.embeds, lm.embed(torch.from_numpy(ids)[None])[0])


@pytest.mark.parametrize("form", ["overlay", "strict"])
def test_what_was_picked_is_shown_beside_gists_of_the_rest(lm: BaseLM, form: Mode) -> None:
    reading = reading_of(lm, random_tree([70 * K]))
    rows, picked = contents_of(Condition(BM25, form), reading, [(40, 0), (3, 0), (67, 0)], 232, 64, 2)
    # Block 67 is shown for being recent, if at all.
    assert picked == [40, 3]
    raw = set((rows.half_tokens[rows.half_tokens % 2 == 0] // 2).tolist())
    for block in (40, 3, 68, 69):
        assert raw >= set(range(block * K, (block + 1) * K))
    assert 232 - K < rows.num_rows <= 232


def test_a_budget_that_holds_the_history_shows_all_of_it(lm: BaseLM) -> None:
    reading = reading_of(lm, random_tree([200, 128, 9]))
    full, _ = contents_of(Condition(FULL), reading, (), 0, 0, 0)
    assert full.num_rows == 337
    assert contents_of(Condition(NONE), reading, (), 0, 0, 0)[0].num_rows == 0
    for condition in conditions((RECENCY, UNIFORM, BM25), FORMS):
        for budget in (337, 2000):
            rows, _ = contents_of(condition, reading, [(2, 0), (0, 0)], budget, 64, 8)
            assert rows.digest() == full.digest(), condition


@given(case=cases())
@settings(deadline=None, max_examples=60)
def test_the_bare_context_is_gists_and_a_tail(lm: BaseLM, case: tuple[list[int], int, int, int, int, int]) -> None:
    lengths, first, stop, budget, tail, _ = case
    reading = reading_of(lm, random_tree(lengths), first, stop)
    smallest = smallest_budget([reading.history])
    wc = bare_context(reading, "overlay", smallest + budget + tail, tail)
    sizes = block_tokens(reading)
    shown, room = [], tail
    for block in reversed(sizes):
        if sizes[block] > room:
            break
        shown.append(block)
        room -= sizes[block]
    assert wc.raw_blocks().tolist() == shown[::-1]
    assert wc.total_cost <= smallest + tail


def test_conditions_are_every_chooser_in_every_form_once() -> None:
    found = [condition.name for condition in conditions(("none", "full", "recency", "uniform"), ("raw", "overlay"))]
    assert found == ["none", "full", "recency/raw", "recency/overlay", "uniform/overlay"]
    assert conditions(("bm25", "bm25", "none"), ("raw", "raw")) == conditions(("bm25", "none"), ("raw",))
    assert len(conditions(CHOOSERS, FORMS)) == 3 * len(CHOOSERS) - 1


@pytest.mark.parametrize(
    ("choosers", "forms", "message"),
    [
        (["recency", "oracel"], ["raw"], "there is no rival 'oracel'; there are: .*oracle_greedy, oracle, none, full"),
        (["recency"], ["raw", "stric"], "there is no form 'stric'; there are: raw, overlay, strict"),
        (["uniform"], ["raw"], "nothing to compare"),
        ([], ["raw"], "nothing to compare"),
    ],
)
def test_mistaken_conditions_are_refused(choosers: list[str], forms: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditions(choosers, forms)
