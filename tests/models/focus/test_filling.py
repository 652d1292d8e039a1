"""Allocators stay within any budget, and spend it on what they are for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError
from models.focus.allocators import FocusRequest, Ranked, Recency, Uniform, ranked_by_score, reciprocal_rank_fusion
from models.focus.filling import Filling, show_newest
from models.focus.history import EntryState, History
from models.focus.working_context import Mode, Node, smallest_budget
from tests.models.focus.test_working_context import MODES, assert_legal, refused
from tests.models.focus.trees import histories, make_tree, with_states


@given(histories(), st.sampled_from(MODES), st.data())
@settings(deadline=None, max_examples=80)
def test_every_allocator_gives_a_legal_context_for_every_budget_that_can_hold_one(
    tree, mode: Mode, data: st.DataObject
) -> None:
    _, history = tree
    smallest = smallest_budget([history])
    budget = smallest + data.draw(st.integers(0, 600))
    blocks = st.integers(history.first_block, max(history.first_block, history.stop_block - 1))
    ranked = data.draw(st.lists(blocks.map(lambda block: (block, 0)), max_size=30)) if history.num_blocks else []
    request = FocusRequest([history], budget, mode, ranked)
    for allocator in (Recency(), Uniform(), Uniform(64), Ranked(64), Ranked(0, 3)):
        wc = allocator.allocate(request)
        assert_legal(wc)
        assert wc.total_cost <= budget
    if smallest:
        with pytest.raises(BudgetError, match=f"smallest that can is {smallest}"):
            Recency().allocate(FocusRequest([history], smallest - 1, mode))


@given(histories(max_blocks=1500), st.sampled_from(MODES), st.data())
@settings(deadline=None, max_examples=60)
def test_a_fillings_count_of_what_is_spent_is_the_contexts_cost(tree, mode: Mode, data: st.DataObject) -> None:
    _, history = tree
    filling = Filling(mode, smallest_budget([history]) + 700, [history])
    for _ in range(data.draw(st.integers(0, 12))):
        if data.draw(st.booleans()) and history.num_blocks:
            block = data.draw(st.integers(history.first_block, history.stop_block - 1))
            price, room = filling.price(block), filling.room
            shows = not refused(history, Node(0, block))
            assert filling.show(block) == (shows and price <= room)
        elif entries := filling.entries():
            lod = data.draw(st.sampled_from(sorted({node.lod for node in entries})))
            node = data.draw(st.sampled_from([node for node in entries if node.lod == lod]))
            assert not (filling.expand(node) and refused(history, node))
        wc = filling.finish()
        assert wc.total_cost == filling.spent
        assert_legal(wc)


def test_recency_shows_the_newest_tokens() -> None:
    history = History.of(make_tree([K**3 + 100], tail=7).reader())
    for mode in MODES:
        wc = Recency().allocate(FocusRequest([history], 400, mode))
        raw = wc.raw_blocks().tolist()
        assert raw == list(range(history.stop_block - len(raw), history.stop_block))
        assert wc.total_cost > 400 - 32


def test_recency_passes_over_what_may_not_be_shown_and_goes_on_behind_it() -> None:
    states = {EntryState.GIST_ONLY: [124, 125], EntryState.TOMBSTONED: [120], EntryState.SPECULATIVE: [127]}
    history = History.of(with_states(make_tree([4 * K * K]).reader(), states))
    for mode in MODES:
        filling = Filling(mode, 4 + 31 + 4 * K, [history])
        assert show_newest(filling, 4 * K) == 4 * K
        wc = filling.finish()
        assert wc.raw_blocks().tolist() == [122, 123, 126, 127]
        assert_legal(wc)


def test_found_blocks_that_may_not_be_shown_take_no_place() -> None:
    states = {EntryState.GIST_ONLY: [3], EntryState.TOMBSTONED: range(2 * K, 3 * K)}
    history = History.of(with_states(make_tree([4 * K * K]).reader(), states))
    ranked = [(3, 0), (70, 0), (40, 0), (9, 0), (10, 0)]
    wc = Ranked(tail_tokens=0, max_blocks=2).allocate(FocusRequest([history], 4 + 2 * K, "overlay", ranked))
    assert wc.raw_blocks().tolist() == [9, 40]


def test_uniform_leaves_tombstones_coarse_and_refines_the_rest() -> None:
    states = {EntryState.TOMBSTONED: range(3 * K, 4 * K), EntryState.GIST_ONLY: range(2 * K, 3 * K)}
    history = History.of(with_states(make_tree([4 * K * K]).reader(), states))
    wc = Uniform().allocate(FocusRequest([history], 10**6, "strict"))
    assert wc.raw_blocks().tolist() == list(range(2 * K))
    assert wc.nodes()[2 * K :] == [*(Node(1, block) for block in range(2 * K, 3 * K)), Node(2, 3)]


def test_one_distant_block_costs_a_strict_tiling_31_slots_a_level_and_an_overlay_none() -> None:
    history = History.of(make_tree([K**3]).reader())
    strict, overlay = (Filling(mode, 1000, [history]) for mode in MODES)
    assert strict.price(17) == 31 + 31 + 31
    assert overlay.price(17) == 32
    assert strict.show(17)
    assert strict.price(18) == 31
    assert strict.price(32 * 5) == 31 + 31


def test_what_was_found_is_shown_and_the_rest_goes_to_recent_tokens() -> None:
    history = History.of(make_tree([4 * K * K]).reader())
    request = FocusRequest([history], 4 + 6 * K, "overlay", [(70, 0), (3, 0), (40, 0)])
    wc = Ranked(tail_tokens=64, max_blocks=2).allocate(request)
    assert wc.raw_blocks().tolist() == [3, 70, 124, 125, 126, 127]
    assert Node(2, 0) in wc.nodes()


def test_uniform_refines_the_coarsest_first() -> None:
    history = History.of(make_tree([K**3]).reader())
    wc = Uniform().allocate(FocusRequest([history], 32 + 31, "strict"))
    assert wc.nodes() == [*(Node(2, i) for i in range(31)), *(Node(1, 31 * K + i) for i in range(32))]


def test_fusion_prefers_what_both_rankings_hold() -> None:
    fused = reciprocal_rank_fusion([[(1, 0), (2, 0), (3, 0)], [(9, 0), (3, 0), (2, 0)]])
    # 2: 1/62 + 1/63; 3: 1/63 + 1/62; then the firsts. Ties go to the newer block.
    assert fused == [(3, 0), (2, 0), (9, 0), (1, 0)]


def test_ranks_leave_out_what_has_no_score() -> None:
    assert ranked_by_score(np.array([0.5, -np.inf, 0.5, 2.0]), first_block=10) == [(13, 0), (12, 0), (10, 0)]


def test_a_block_shown_beside_its_gist_gives_it_up_when_it_is_shown_in_its_place() -> None:
    history = History.of(make_tree([40 * K]).reader())
    filling = Filling("overlay", 200, [history])
    before = filling.spent
    assert filling.price(35, beside=True) == K
    assert filling.show(35, beside=True)
    assert filling.spent == before + K == filling.finish().total_cost
    assert {Node(1, 35), Node(0, 35)} <= set(filling.finish().nodes())
    assert filling.show(35, beside=True)
    assert filling.spent == before + K
    assert filling.show(35)
    assert filling.spent == before + K - 1 == filling.finish().total_cost
    assert Node(1, 35) not in filling.finish().nodes()
    # Below a gist of LOD2 there is none of its own.
    assert filling.show(3, beside=True)
    assert filling.price(4, beside=True) == filling.price(4) == K
    assert filling.finish().total_cost == filling.spent
