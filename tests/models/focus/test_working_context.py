"""Random trees, parts of them and edit sequences: a Working Context is legal, always."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError, FocusError
from models.focus.history import EntryState, History, blocks_per_node
from models.focus.working_context import Mode, Node, WorkingContext, smallest_budget
from tests.models.focus.trees import histories, make_tree, with_states

MODES: tuple[Mode, ...] = ("strict", "overlay")
PLENTY = 10**9


def assert_legal(wc: WorkingContext) -> None:
    """Checked entry by entry, without any of the class's own arithmetic."""
    assert sum(wc.cost.tolist()) <= wc.budget
    for source, history in enumerate(wc.histories):
        covered = np.zeros(history.num_blocks, int)
        previous = (-1, 0)
        for lod, index, owner in wc.nodes():
            if owner != source or (lod == 0 and index == history.stop_block):
                continue
            assert index < history.num_nodes(lod)
            size = 1 if lod <= 1 else K ** (lod - 1)
            start = index * size - history.first_block
            assert start >= 0
            assert start + size <= history.num_blocks
            covered[start : start + size] += 1
            assert (start, -lod) > previous
            previous = (start, -lod)
        assert covered.min(initial=1) >= 1
        if wc.mode == "strict":
            assert covered.max(initial=1) == 1
    assert_states_are_kept(wc)


def assert_states_are_kept(wc: WorkingContext) -> None:
    """States are those of the blocks, and nothing is shown that they do not let show."""
    assert wc.state.shape == (len(wc),)
    for (lod, index, source), state in zip(wc.nodes(), wc.state.tolist(), strict=True):
        history = wc.histories[source]
        if lod == 0 and index == history.stop_block:
            assert state == EntryState.WHOLE
            continue
        found = states_below(history, lod, index)
        if len(found) == 1:
            assert {state} == found
        else:
            detail = [EntryState.WHOLE, EntryState.SPECULATIVE, EntryState.GIST_ONLY]
            assert state == next(kind for kind in detail if kind in found)
        if lod == 0:
            assert state in {EntryState.WHOLE, EntryState.SPECULATIVE}
        first_block = index * blocks_per_node(lod)
        for level in range(lod + 1, history.max_lod + 1):
            if inside(history, level, first_block):
                assert states_below(history, level, first_block // blocks_per_node(level)) != {EntryState.TOMBSTONED}


def assert_detail_is_refused(wc: WorkingContext) -> None:
    """Expanding fails for the newest gist of each level whose state lets no detail show."""
    closed = {node.lod: node for node in wc.nodes() if node.lod > 0 and refused(wc.histories[node.source], node)}
    for node in closed.values():
        with pytest.raises(FocusError, match=r"node .* is (gist-only|tombstoned); show node .* in its place"):
            wc.expand(node)


def states_below(history: History, lod: int, index: int) -> set[int]:
    """States of a node's blocks."""
    if history.block_states is None:
        return {EntryState.WHOLE}
    start = index * blocks_per_node(lod) - history.first_block
    return set(history.block_states[start : start + blocks_per_node(lod)].tolist())


def refused(history: History, node: Node) -> bool:
    """Whether no detail of a gist may be shown; of a block, whether its tokens may not."""
    found = states_below(history, node.lod, node.index)
    if node.lod <= 1:
        return bool(found & {EntryState.GIST_ONLY, EntryState.TOMBSTONED})
    return found == {EntryState.TOMBSTONED}


@given(histories(), st.sampled_from(MODES))
@settings(deadline=None, max_examples=60)
def test_the_coarsest_is_legal_and_costs_the_least(tree, mode: Mode) -> None:
    _, history = tree
    smallest = smallest_budget([history])
    wc = WorkingContext.coarsest(mode, smallest, [history])
    assert_legal(wc)
    assert wc.total_cost == smallest
    assert wc.num_tokens.sum() == history.num_tokens
    if smallest:
        with pytest.raises(BudgetError, match=f"smallest budget .* is {smallest}"):
            WorkingContext.coarsest(mode, smallest - 1, [history])


@given(histories(max_blocks=1200), st.sampled_from(MODES), st.data())
@settings(deadline=None, max_examples=80)
def test_any_sequence_of_edits_leaves_it_legal(tree, mode: Mode, data: st.DataObject) -> None:
    _, history = tree
    wc = WorkingContext.coarsest(mode, PLENTY, [history])
    for _ in range(data.draw(st.integers(1, 12))):
        gists = [node for node in wc.nodes() if node.lod > 0]
        open_gists = [node for node in gists if not refused(history, node)]
        blocks = [node for node in wc.nodes() if node.lod == 0 and node.index < history.stop_block]
        choice = data.draw(st.sampled_from(["expand", "collapse", "show", "hide"]))
        before = wc.nodes()
        if choice == "expand" and open_gists:
            # Coarse ones are few among the fine.
            lod = data.draw(st.sampled_from(sorted({node.lod for node in open_gists})))
            node = data.draw(st.sampled_from([node for node in open_gists if node.lod == lod]))
            wc = wc.expand(node)
        elif choice == "collapse" and (blocks or gists):
            below = data.draw(st.sampled_from(blocks + gists))
            block = below.index * blocks_per_node(below.lod)
            lods = [lod for lod in range(below.lod + 1, history.max_lod + 1) if inside(history, lod, block)]
            if not lods:
                continue
            lod = data.draw(st.sampled_from(lods))
            wc = wc.collapse(Node(lod, block // blocks_per_node(lod)))
        elif choice == "show" and mode == "overlay" and history.num_blocks:
            block = data.draw(st.integers(history.first_block, history.stop_block - 1))
            if Node(0, block) in before:
                continue
            if refused(history, Node(0, block)):
                with pytest.raises(FocusError, match=rf"node \(0, {block}\) .* in its place"):
                    wc.show([Node(0, block)])
                continue
            wc = wc.show([Node(0, block)])
        elif choice == "hide" and mode == "overlay" and blocks:
            node = data.draw(st.sampled_from(blocks))
            covered = any(n.lod > 0 and n.index == node.index // blocks_per_node(n.lod) for n in before)
            if covered:
                wc = wc.hide([node])
            else:
                with pytest.raises(FocusError, match="nothing represents"):
                    wc.hide([node])
        assert_legal(wc)
        assert_detail_is_refused(wc)


def inside(history: History, lod: int, block: int) -> bool:
    """Whether the node of a level over a block exists and lies in the history."""
    index = block // blocks_per_node(lod)
    first, stop = history.node_range(lod)
    return first <= index < stop


def test_expanding_and_collapsing_are_inverse() -> None:
    history = History.of(make_tree([2 * K**3]).reader())
    wc = WorkingContext.coarsest("strict", PLENTY, [history])
    assert wc.nodes() == [Node(3, 0), Node(3, 1)]
    opened = wc.expand(Node(3, 1)).expand(Node(2, 40)).expand(Node(1, 40 * K + 7))
    assert opened.total_cost == 1 + 31 + 31 + 32
    assert opened.collapse(Node(3, 1)).same_entries(wc)
    assert opened.raw_blocks().tolist() == [40 * K + 7]


def test_an_overlay_keeps_the_ancestor_and_a_strict_one_does_not() -> None:
    history = History.of(make_tree([K**3]).reader())
    overlay = WorkingContext.coarsest("overlay", PLENTY, [history]).show([Node(0, 5), Node(0, 900)])
    assert overlay.nodes() == [Node(3, 0), Node(0, 5), Node(0, 900)]
    assert overlay.total_cost == 1 + 64
    with pytest.raises(FocusError, match="shown twice"):
        WorkingContext.of("strict", PLENTY, [history], overlay.nodes())
    with pytest.raises(FocusError, match="needs mode overlay"):
        WorkingContext.coarsest("strict", PLENTY, [history]).show([Node(0, 5)])


def test_places_and_widths_count_real_tokens() -> None:
    tree = make_tree([40, 33, K], tail=5)
    wc = WorkingContext.coarsest("strict", PLENTY, [History.of(tree.reader())])
    wc = wc.expand(Node(1, 1))
    assert wc.nodes()[-1] == Node(0, 5)
    assert wc.num_tokens.tolist() == [32, 8, 32, 1, 32, 5]
    assert wc.first_token.tolist() == [0, 32, 40, 72, 73, 105]
    assert wc.mu.tolist() == [31, 2 * 32 + 7, 2 * 40 + 31, 2 * 72, 2 * 73 + 31, 2 * 105 + 4]
    assert wc.cost.tolist() == [1, 8, 1, 1, 1, 5]
    uniform = np.arange(32)
    np.testing.assert_allclose(wc.sigma[0], uniform.std(), rtol=1e-6)
    assert wc.sigma[3] == 0


def test_several_histories_stand_one_after_the_other() -> None:
    first, second = (History.of(make_tree([tokens]).reader()) for tokens in (70, 40))
    wc = WorkingContext.coarsest("strict", 10, [first, second])
    assert [node.source for node in wc.nodes()] == [0, 0, 0, 1, 1]
    assert wc.first_token.tolist() == [0, 32, 64, 70, 102]
    assert wc.total_tokens == 110


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(1, 0, 0), (1, 2, 0)], "nothing represents block 1"),
        ([(1, 1, 0), (1, 2, 0)], "nothing represents block 0"),
        ([(1, 0, 0), (1, 1, 0)], "nothing represents block 2"),
        ([(1, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)], "shown twice"),
        ([(1, 0, 0), (0, 0, 0), (1, 1, 0), (1, 2, 0)], "shown twice"),
        ([(1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0)], "does not exist"),
        ([(2, 0, 0)], "does not exist"),
        ([], "nothing represents blocks 0-3"),
    ],
)
def test_what_is_not_legal_is_refused(nodes, message: str) -> None:
    history = History.of(make_tree([96]).reader())
    with pytest.raises(FocusError, match=message):
        WorkingContext.of("strict", PLENTY, [history], nodes)


def stated_history(*, first_block: int = 0, max_lod: int = 9) -> History:
    """Four super-blocks, of which the third is tombstoned; a block of each other state in the first."""
    states = {
        EntryState.GIST_ONLY: [5],
        EntryState.TOMBSTONED: [6, *range(2 * K, 3 * K)],
        EntryState.SPECULATIVE: [7, *range(3 * K, 4 * K)],
    }
    return History.of(with_states(make_tree([4 * K * K], max_lod=max_lod).reader(), states), first_block)


def test_states_are_those_of_the_blocks_and_survive_edits() -> None:
    whole, gist_only, tombstoned, speculative = EntryState
    wc = WorkingContext.coarsest("strict", PLENTY, [stated_history()])
    # The first one is mixed: whole, because something of it can be shown in full.
    assert wc.state.tolist() == [whole, whole, tombstoned, speculative]
    opened = wc.expand(Node(2, 0)).expand(Node(1, 4)).expand(Node(1, 7))
    assert opened.nodes()[4:8] == [Node(0, 4), Node(1, 5), Node(1, 6), Node(0, 7)]
    assert opened.state[4:8].tolist() == [whole, gist_only, tombstoned, speculative]
    assert opened.collapse(Node(2, 0)).state.tolist() == wc.state.tolist()
    assert WorkingContext.coarsest("strict", 2, [History.of(make_tree([40]).reader())]).state.tolist() == [whole, whole]


def test_a_node_of_mixed_blocks_has_the_state_that_shows_most() -> None:
    whole, gist_only, tombstoned, speculative = EntryState
    mixed = {gist_only: [0, K], tombstoned: range(1, K), speculative: range(K + 1, 2 * K)}
    wc = WorkingContext.coarsest("strict", 3, [History.of(with_states(make_tree([3 * K * K]).reader(), mixed))])
    assert wc.state.tolist() == [gist_only, speculative, whole]


@pytest.mark.parametrize(
    ("expanded", "message"),
    [
        ([(2, 0), (1, 5)], r"node \(0, 5\) of version \d+ .* is gist-only; show node \(1, 5\) in its place"),
        ([(2, 0), (1, 6)], r"node \(0, 6\) of version \d+ .* is tombstoned; show node \(1, 6\) in its place"),
        ([(2, 2)], r"node \(1, 64\) of version \d+ .* is tombstoned; show node \(2, 2\) in its place"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_detail_that_its_state_does_not_let_show_is_refused(mode: Mode, expanded, message: str) -> None:
    wc = WorkingContext.coarsest(mode, PLENTY, [stated_history()])
    for node in expanded[:-1]:
        wc = wc.expand(Node(*node))
    with pytest.raises(FocusError, match=message):
        wc.expand(Node(*expanded[-1]))


def test_raw_tokens_of_a_tombstone_are_refused_in_favour_of_the_coarsest_node() -> None:
    overlay = WorkingContext.coarsest("overlay", PLENTY, [stated_history()])
    with pytest.raises(FocusError, match=r"node \(0, 70\) .* is tombstoned; show node \(2, 2\) in its place"):
        overlay.show([Node(0, 70)])
    with pytest.raises(FocusError, match=r"node \(1, 70\) .* is tombstoned; show node \(2, 2\) in its place"):
        overlay.show([Node(1, 70)])
    # In a second history as in the first.
    wc = WorkingContext.coarsest("strict", PLENTY, [History.of(make_tree([40]).reader()), stated_history()])
    with pytest.raises(FocusError, match="is tombstoned"):
        wc.expand(Node(2, 2, 1))


def test_a_tombstone_is_shown_in_parts_where_no_node_holds_all_of_it() -> None:
    for history in (stated_history(max_lod=1), stated_history(first_block=2 * K + 1)):
        wc = WorkingContext.coarsest("strict", PLENTY, [history])
        tombstones = [node for node, state in zip(wc.nodes(), wc.state, strict=True) if state == EntryState.TOMBSTONED]
        assert {node.lod for node in tombstones} == {1}
        assert_legal(wc)


def test_states_are_checked() -> None:
    part = (1, (2,), 0, 2, np.array([0, 32, 64]))
    with pytest.raises(FocusError, match="2 blocks need as many states"):
        History("x", *part, block_states=np.zeros(3, np.int8))
    with pytest.raises(FocusError, match="no block state 4"):
        History("x", *part, block_states=np.array([0, 4], np.int8))
    assert History.of(with_states(make_tree([40]).reader(), {})).block_states is None


def test_a_part_of_a_timeline_is_tiled_by_what_lies_inside_it() -> None:
    reader = make_tree([3 * K * K]).reader()
    history = History.of(reader, 20, 3 * K - 1)
    lods, indices = history.roots()
    expected = [(1, i) for i in range(20, K)] + [(2, 1)] + [(1, i) for i in range(2 * K, 3 * K - 1)]
    assert list(zip(lods.tolist(), indices.tolist(), strict=True)) == expected
    with pytest.raises(FocusError, match="outside version"):
        History.of(reader, 0, 97)


def test_an_empty_history_has_an_empty_working_context() -> None:
    wc = WorkingContext.coarsest("strict", 0, [History.of(make_tree([]).reader())])
    assert len(wc) == 0
    assert wc.total_cost == 0
