"""Whatever is asked, the next Working Context is legal, and what stands in it has a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BudgetError, FocusError
from models.focus.history import History
from models.focus.refocus import BlockName, Focus, RefocusPolicy, refocus
from models.focus.working_context import WorkingContext, smallest_budget
from storage.contract import DocumentMeta, SpanWrite
from storage.memory_tree import MemoryTree
from storage.schema import GISTS
from tests.models.focus.trees import make_tree, node_values

CALM = RefocusPolicy(
    mode="overlay",
    strategy="greedy",
    tail_tokens=64,
    max_blocks=3,
    age_tokens=64,
    keep_bonus=0.15,
    cooldown=2,
    row_price=0.0005,
    exploration=0.1,
)


def grow(tree: MemoryTree, num_blocks: int) -> None:
    """Add a document of whole blocks, and what it completes above."""
    first = tree.version().num_blocks
    slots = ((np.arange(num_blocks * K) + first) % 251).astype(np.uint32).reshape(-1, K)
    meta = DocumentMeta(f"more{first}", f"file:///more{first}")
    gists = node_values(1, np.arange(first, first + num_blocks), 1)
    tree.append([SpanWrite(meta, 0, slots, np.full(num_blocks, K, np.uint8), {GISTS: gists}, last=True)])
    lod = 2
    while tree.version().num_nodes(lod - 1) >= K:
        have, could = tree.version().num_nodes(lod), tree.version().num_nodes(lod - 1) // K
        if could > have:
            tree.put_nodes(lod, have, {GISTS: node_values(lod, np.arange(have, could), 1)})
        lod += 1


def history(tree: MemoryTree) -> History:
    return History.of(tree.reader())


def raw(focus: Focus, source: int = 0) -> set[int]:
    return set(focus.wc.raw_blocks(source).tolist())


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.sampled_from(["overlay", "strict"]),
    st.sampled_from(["greedy", "optimal", "stochastic", "recency"]),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_refocus_is_legal_and_within_its_budget(lengths: list[int], mode, strategy, data: st.DataObject) -> None:
    trees = [make_tree([lengths[0] * K + 5]), make_tree([9])]
    policy = replace(CALM, mode=mode, strategy=strategy)
    focus: Focus | None = None
    for number, length in enumerate(lengths):
        grow(trees[1], length)
        histories = [history(tree) for tree in trees]
        least = smallest_budget(histories)
        budget = least + data.draw(st.integers(0, 400))
        blocks = st.tuples(st.integers(0, 80), st.integers(0, 1))
        scores = data.draw(st.dictionaries(blocks, st.floats(0, 1, width=16), max_size=8))
        pinned = [name for name in data.draw(st.lists(blocks, max_size=2)) if name[0] < histories[name[1]].stop_block]
        before = () if focus is None else focus.found
        focus = refocus(
            policy,
            histories,
            budget,
            scores,
            focus,
            pinned=pinned,
            new_question=data.draw(st.booleans()),
            rows_behind_found=data.draw(st.sampled_from([None, 0, 100])),
            seed=number,
        )
        # The Working Context checks itself when it is made; nothing is left for us but what it does not know.
        assert isinstance(focus.wc, WorkingContext)
        assert focus.wc.total_cost <= budget
        shown = {(block, source) for source in (0, 1) for block in raw(focus, source)}
        assert {*focus.found, *focus.pinned} <= shown
        assert {*focus.pinned, *focus.unfit} == set(pinned)
        assert not {*focus.dropped} & {*focus.found}
        assert all(scores.get(name, 0) > 0 or name in before for name in focus.found)
        assert set(range(focus.tail_from, histories[1].stop_block)) <= raw(focus, 1)


@pytest.fixture
def tree() -> MemoryTree:
    return make_tree([60 * K])


def scored(**scores: float) -> dict[BlockName, float]:
    return {(int(name[1:]), 0): score for name, score in scores.items()}


def test_what_is_found_is_shown_beside_the_newest(tree: MemoryTree) -> None:
    focus = refocus(CALM, [history(tree)], 400, scored(b3=0.9, b7=0.5, b9=0.4, b11=0.1, b13=0.0))
    assert focus.found == ((3, 0), (7, 0), (9, 0))
    assert raw(focus) == {3, 7, 9, *range(focus.tail_from, 60)}
    assert 400 - CALM.age_tokens - K < focus.wc.total_cost <= 400 - CALM.age_tokens


def test_nothing_changes_where_nothing_is_new(tree: MemoryTree) -> None:
    scores = scored(b3=0.9, b7=0.5)
    first = refocus(CALM, [history(tree)], 400, scores)
    again = refocus(CALM, [history(tree)], 400, scores, first)
    assert again.wc.same_entries(first.wc)
    assert (again.added, again.dropped, again.num_aged) == ((), (), 0)


def test_a_little_better_is_not_enough(tree: MemoryTree) -> None:
    first = refocus(CALM, [history(tree)], 400, scored(b3=0.9, b7=0.5, b9=0.4))
    calm = refocus(CALM, [history(tree)], 400, scored(b3=0.9, b7=0.5, b9=0.4, b5=0.5), first)
    assert calm.found == first.found
    swapped = refocus(CALM, [history(tree)], 400, scored(b3=0.9, b7=0.5, b9=0.1, b5=0.9), first)
    assert (swapped.added, swapped.dropped) == (((5, 0),), ((9, 0),))


def test_what_was_given_up_waits_unless_there_is_a_new_question(tree: MemoryTree) -> None:
    histories = [history(tree)]
    first = refocus(CALM, histories, 400, scored(b3=0.9, b7=0.5, b9=0.1))
    second = refocus(CALM, histories, 400, scored(b3=0.9, b7=0.5, b5=0.9), first)
    assert (9, 0) in second.dropped
    back = scored(b3=0.1, b7=0.5, b5=0.1, b9=1.0)
    assert (9, 0) not in refocus(CALM, histories, 400, back, second).found
    assert (9, 0) in refocus(CALM, histories, 400, back, second, new_question=True).found
    later = second
    for _ in range(CALM.cooldown):
        later = refocus(CALM, histories, 400, scored(b3=0.9, b7=0.5, b5=0.9), later)
    assert (9, 0) in refocus(CALM, histories, 400, back, later).found


def test_the_tail_ages_in_batches(tree: MemoryTree) -> None:
    focus = refocus(CALM, [history(tree)], 400, {})
    aged = []
    for _ in range(12):
        grow(tree, 1)
        before = focus
        focus = refocus(CALM, [history(tree)], 400, {}, before)
        aged.append(focus.num_aged)
        assert focus.tail_from == before.tail_from + focus.num_aged
        assert (focus.added, focus.dropped) == ((), ())
    # Each time it gives way it makes room for the blocks that follow.
    assert [n for n in aged if n] == [n for n in aged if n >= CALM.age_tokens // K]
    assert 3 <= sum(n > 0 for n in aged) <= 6


def test_found_blocks_stay_while_the_tail_ages(tree: MemoryTree) -> None:
    scores = scored(b3=0.9, b7=0.5, b9=0.4)
    focus = refocus(CALM, [history(tree)], 400, scores)
    for _ in range(8):
        grow(tree, 1)
        focus = refocus(CALM, [history(tree)], 400, scores, focus)
        assert {3, 7, 9} <= raw(focus)
    assert dict(focus.since) == {(3, 0): 0, (7, 0): 0, (9, 0): 0}


def test_pinned_blocks_are_shown_whatever_is_found(tree: MemoryTree) -> None:
    focus = refocus(CALM, [history(tree)], 400, scored(b3=0.9), pinned=[(20, 0), (21, 0)])
    assert {3, 20, 21} <= raw(focus)
    assert focus.pinned == ((20, 0), (21, 0))
    tight = smallest_budget([history(tree)]) + K
    narrow = refocus(CALM, [history(tree)], tight, scored(b3=0.9), pinned=[(20, 0), (21, 0)])
    assert (narrow.pinned, narrow.unfit, narrow.found) == (((20, 0),), ((21, 0),), ())


def test_recency_shows_nothing_else(tree: MemoryTree) -> None:
    focus = refocus(replace(CALM, strategy="recency"), [history(tree)], 400, scored(b3=0.9))
    assert raw(focus) == set(range(focus.tail_from, 60))


def test_of_several_contexts_the_last_has_the_tail(tree: MemoryTree) -> None:
    own = make_tree([3 * K], tail=7)
    focus = refocus(CALM, [history(tree), history(own)], 300, {(3, 0): 0.9, (1, 1): 0.8})
    assert raw(focus, 0) == {3}
    assert raw(focus, 1) == {0, 1, 2}
    assert focus.found == ((3, 0),)


def test_a_budget_that_holds_nothing_is_refused(tree: MemoryTree) -> None:
    with pytest.raises(BudgetError, match="smallest that can is"):
        refocus(CALM, [history(tree)], 5, {})
    with pytest.raises(FocusError, match="sizes of 0 or more"):
        replace(CALM, age_tokens=0)
    with pytest.raises(FocusError, match="bonus, price and noise"):
        replace(CALM, row_price=-1.0)
