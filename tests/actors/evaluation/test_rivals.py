"""Equal slots: no condition shows more than the budget, the raw ones exactly that, and each what it chose."""

from __future__ import annotations

from dataclasses import replace

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
    LATE,
    NONE,
    RAW_FORMS,
    RECENCY,
    TASK_CHOOSERS,
    TASK_FORMS,
    UNIFORM,
    Condition,
    bare_context,
    conditions,
    contents_of,
    working_context,
)
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError, ConfigError
from models.base_lm import BaseLM
from models.focus.working_context import smallest_budget
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
        if condition.form not in RAW_FORMS and not fits:
            with pytest.raises(BudgetError):
                contents_of(condition, reading, ranked, budget, tail, max_blocks)
            continue
        rows, picked = contents_of(condition, reading, ranked, budget, tail, max_blocks)
        assert rows.num_rows == len(rows.half_tokens) <= budget, condition
        assert len(picked) <= max_blocks
        if condition.form in RAW_FORMS:
            assert rows.num_rows == min(budget, sum(sizes.values())), condition
            in_order = contents_of(replace(condition, form="raw"), reading, ranked, budget, tail, max_blocks)[0]
            assert np.all(np.diff(in_order.half_tokens) > 0), condition
            order = np.argsort(rows.half_tokens)
            assert np.array_equal(rows.half_tokens[order], in_order.half_tokens), "another order of the same rows"
            assert torch.equal(rows.embeds[torch.from_numpy(order)], in_order.embeds)
            if condition.form in LATE and picked:
                ends = np.cumsum(list(sizes.values()))
                found = np.isin(first + np.searchsorted(ends, rows.half_tokens // 2, "right"), picked)
                behind = rows.num_rows - 1 - int(np.flatnonzero(found)[-1])
                assert behind == min(LATE[condition.form], int((~found).sum())), condition
                assert np.all(np.diff(np.flatnonzero(found)) == 1), "what was chosen stands together"
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


def test_the_best_run_of_blocks_stands_last(lm: BaseLM) -> None:
    reading = reading_of(lm, random_tree([20 * K]))
    ranked = [(9, 0), (3, 0), (8, 0), (14, 0)]
    rows, picked = contents_of(Condition(BM25, "late_ranked"), reading, ranked, 5 * K, K, 4)
    assert picked == [9, 3, 8, 14]
    assert (rows.half_tokens[::K] // 2 // K).tolist() == [19, 14, 3, 8, 9]


@pytest.mark.parametrize("form", ["overlay", "strict", "constant"])
def test_what_was_picked_is_shown_beside_gists_of_the_rest(lm: BaseLM, form: str) -> None:
    reading = reading_of(lm, random_tree([70 * K]))
    rows, picked = contents_of(Condition(BM25, form), reading, [(40, 0), (3, 0), (67, 0)], 232, 64, 2)
    # Block 67 is shown for being recent, if at all.
    assert picked == [40, 3]
    raw = set((rows.half_tokens[rows.half_tokens % 2 == 0] // 2).tolist())
    for block in (40, 3, 68, 69):
        assert raw >= set(range(block * K, (block + 1) * K))
    assert 232 - K < rows.num_rows <= 232


@pytest.mark.parametrize("chooser", [BM25, RECENCY, UNIFORM])
def test_the_constant_form_is_the_overlay_with_gists_that_say_nothing(lm: BaseLM, chooser: str) -> None:
    reading = reading_of(lm, random_tree([40 * K, 35 * K + 5]))
    constant = lm.embed(torch.tensor([[10]]))[0, 0]
    reading = Reading(lm, reading.reader, reading.history, constant)
    ranked = [(40, 0), (3, 0)]
    overlay, picked = contents_of(Condition(chooser, "overlay"), reading, ranked, 300, 64, 2)
    found, same = contents_of(Condition(chooser, "constant"), reading, ranked, 300, 64, 2)
    assert same == picked == ([40, 3] if chooser == BM25 else [])
    assert found.half_tokens.tolist() == overlay.half_tokens.tolist()
    wc = working_context(Condition(chooser, "overlay"), reading.history, ranked, 300, 64, 2)
    is_gist = torch.tensor([lod > 0 for lod, cost in zip(wc.lod, wc.cost, strict=True) for _ in range(cost)])
    assert 0 < int(is_gist.sum()) < len(is_gist)
    assert torch.equal(found.embeds[~is_gist], overlay.embeds[~is_gist])
    assert torch.equal(found.embeds[is_gist], constant.expand(int(is_gist.sum()), -1))
    assert not torch.equal(found.embeds[is_gist], overlay.embeds[is_gist])
    # Whoever gives no constant gets vectors of zeros.
    bare, _ = contents_of(Condition(chooser, "constant"), reading_of(lm, random_tree([70 * K])), ranked, 300, 64, 2)
    assert not bare.embeds[bare.half_tokens % 2 == 1].any()


def test_a_budget_that_holds_the_history_shows_all_of_it(lm: BaseLM) -> None:
    reading = reading_of(lm, random_tree([200, 128, 9]))
    full, _ = contents_of(Condition(FULL), reading, (), 0, 0, 0)
    assert full.num_rows == 337
    assert contents_of(Condition(NONE), reading, (), 0, 0, 0)[0].num_rows == 0
    for condition in conditions((RECENCY, UNIFORM, BM25), FORMS):
        for budget in (337, 2000):
            rows, _ = contents_of(condition, reading, [(2, 0), (0, 0)], budget, 64, 8)
            order = np.argsort(rows.half_tokens)
            assert rows.ordered(order).digest() == full.digest(), condition


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
    assert len(conditions(CHOOSERS, FORMS)) == len(FORMS) * len(CHOOSERS) - len(RAW_FORMS)


def test_a_rival_may_name_its_form_and_its_policy() -> None:
    found = conditions(
        [
            "none",
            "bm25",
            "recency/constant",
            "oracle/overlay@global",
            "oracle/overlay@compact",
            "bm25/raw",
            "dense@anchored",
        ],
        ["raw", "strict"],
    )
    assert found == [
        Condition("none"),
        Condition("bm25", "raw"),
        Condition("bm25", "strict"),
        Condition("recency", "constant"),
        Condition("oracle", "overlay", "global"),
        Condition("oracle", "overlay", "compact"),
        Condition("dense", "raw", "anchored"),
        Condition("dense", "strict", "anchored"),
    ]
    assert [condition.name for condition in found] == [
        *("none", "bm25/raw", "bm25/strict", "recency/constant", "oracle/overlay@global", "oracle/overlay@compact"),
        *("dense/raw@anchored", "dense/strict@anchored"),
    ]
    assert {c.form for c in found if c.mode == "strict"} == {"strict"}
    # Names are what reports and recipes say: each reads as the condition it came from.
    for condition in conditions((*CHOOSERS, "none", "full"), FORMS):
        assert conditions([condition.name], ["strict"]) == [condition]
    # Forms are for those without one of their own.
    assert [c.name for c in conditions(["uniform/overlay"], ["raw"])] == ["uniform/overlay"]
    assert [c.name for c in conditions(["uniform/overlay"], [])] == ["uniform/overlay"]


@pytest.mark.parametrize(
    ("choosers", "forms", "message"),
    [
        (
            ["recency", "oracel"],
            ["raw"],
            "there is no rival 'oracel'; there are: recency, .*oracle_greedy, oracle, exhaustive, none, full",
        ),
        (["oracel/raw"], ["raw"], "there is no rival 'oracel'"),
        (["needles"], ["raw"], "there is no rival 'needles'"),
        (
            ["recency"],
            ["raw", "stric"],
            "there is no form 'stric'; there are: raw, late, late_ranked, late64, overlay, strict, constant",
        ),
        (
            ["recency/stric"],
            ["raw"],
            "there is no form 'stric'; there are: raw, late, late_ranked, late64, overlay, strict, constant",
        ),
        (
            ["recency/raw@gaussian"],
            ["raw"],
            "there is no position policy 'gaussian'; there are: global, compact, anchored",
        ),
        (["recency/raw@auto"], ["raw"], "there is no position policy 'auto'"),
        (["recency@raw"], ["raw"], "there is no position policy 'raw'"),
        (["recency/"], ["raw"], "there is no form ''"),
        (["recency/raw@"], ["raw"], "there is no position policy ''"),
        (["full/raw"], ["raw"], "rival 'full' has neither forms nor policies; write 'full'"),
        (["none@compact"], ["raw"], "rival 'none' has neither forms nor policies; write 'none'"),
        (["uniform/raw"], ["overlay"], "nothing to compare"),
        (["uniform"], ["raw"], "nothing to compare"),
        ([], ["raw"], "nothing to compare"),
    ],
)
def test_mistaken_conditions_are_refused(choosers: list[str], forms: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditions(choosers, forms)


def test_tasks_have_rivals_and_forms_of_their_own() -> None:
    assert [c.name for c in conditions(["needles", "bm25/strict"], ["raw"], TASK_CHOOSERS, TASK_FORMS)] == [
        "needles",
        "bm25/strict",
    ]
    for rival, message in (
        ("rerank", "there is no rival 'rerank'; there are: none, full, needles, .*oracle$"),
        ("bm25/constant", "there is no form 'constant'; there are: raw, late, late_ranked, late64, overlay, strict$"),
        ("needles/raw", "rival 'needles' has neither forms nor policies"),
    ):
        with pytest.raises(ConfigError, match=message):
            conditions([rival], ["raw"], TASK_CHOOSERS, TASK_FORMS)
