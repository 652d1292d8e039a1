"""Rows before a horizon: equal contents are equal, raw tokens stand at their true places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.focus.working_context import Node, WorkingContext
from storage.memory_tree import MemoryTree
from tests.actors.evaluation.support import random_tree, reading_of

SIZES = (70, 5, 64, 100)
"""Blocks of 32, 32, 6 | 5 | 32, 32 | 32, 32, 32, 4 tokens."""
BLOCK_TOKENS = (32, 32, 6, 5, 32, 32, 32, 32, 32, 4)


@pytest.fixture(scope="module")
def tree() -> MemoryTree:
    return random_tree(SIZES)


def tokens_by_hand(reading: Reading, blocks: list[int]) -> tuple[list[int], list[int]]:
    """Ids and places of blocks, token by token."""
    ids, places = [], []
    for block in sorted(set(blocks)):
        before = sum(BLOCK_TOKENS[reading.history.first_block : block])
        slots = reading.reader.tokens(block, 1)[0][0].tolist()
        for slot in range(BLOCK_TOKENS[block]):
            ids.append(slots[slot])
            places.append(before + slot)
    return ids, places


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_raw_blocks_are_their_tokens_at_their_places(lm: BaseLM, tree: MemoryTree, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(BLOCK_TOKENS) - 1))
    stop = data.draw(st.integers(first + 1, len(BLOCK_TOKENS)))
    reading = reading_of(lm, tree, first, stop)
    blocks = data.draw(st.lists(st.integers(first, stop - 1), max_size=12))
    rows = reading.raw(blocks)
    ids, places = tokens_by_hand(reading, blocks)
    assert rows.half_tokens.tolist() == [2 * place for place in places]
    assert torch.equal(rows.embeds, lm.embed(torch.tensor([ids], dtype=torch.int64))[0])
    assert reading.ids(first, stop - first).tolist() == tokens_by_hand(reading, list(range(first, stop)))[0]


def test_a_context_of_raw_entries_equals_raw_blocks(lm: BaseLM, tree: MemoryTree) -> None:
    reading = reading_of(lm, tree)
    everything = range(len(BLOCK_TOKENS))
    wc = WorkingContext.of("strict", 1000, [reading.history], [Node(0, block) for block in everything])
    assert reading.context(wc).digest() == reading.raw(everything).digest()


def test_the_same_for_every_gist_leaves_tokens_and_places_alone(lm: BaseLM, tree: MemoryTree) -> None:
    reading = reading_of(lm, tree)
    constant = torch.arange(lm.hidden_size, dtype=lm.dtype)
    reading = Reading(lm, reading.reader, reading.history, constant)
    entries = [*(Node(1, block) for block in range(6)), *(Node(0, block) for block in (1, 6, 7, 8, 9))]
    wc = WorkingContext.of("overlay", 1000, [reading.history], entries)
    plain, same = reading.context(wc), reading.context(wc, same_gists=True)
    assert same.half_tokens.tolist() == plain.half_tokens.tolist()
    is_gist = torch.tensor([True] * 2 + [False] * 32 + [True] * 4 + [False] * 100)
    assert torch.equal(same.embeds[is_gist], constant.expand(6, -1))
    assert torch.equal(same.embeds[~is_gist], reading.raw([1, 6, 7, 8, 9]).embeds)
    assert not (plain.embeds[is_gist] == constant).all(dim=1).any()
    # What the assembler keeps is not what was changed.
    assert torch.equal(reading.context(wc).embeds, plain.embeds)


def test_digests_are_equal_for_equal_contents_only(lm: BaseLM, tree: MemoryTree) -> None:
    reading = reading_of(lm, tree)
    rows = reading.raw([0, 1, 5])
    assert Contents(rows.embeds.clone(), rows.half_tokens.copy()).digest() == rows.digest()
    assert Contents.joined([rows.rows(0, 40), rows.rows(40, rows.num_rows)]).digest() == rows.digest()
    moved = Contents(rows.embeds, rows.half_tokens + 2)
    changed = rows.embeds.clone()
    changed[-1, -1] += 1e-6
    others = [moved, Contents(changed, rows.half_tokens), reading.raw([0, 1]), reading.nothing()]
    assert len({other.digest() for other in [rows, *others]}) == 5


def test_no_row_at_all(lm: BaseLM, tree: MemoryTree) -> None:
    reading = reading_of(lm, tree)
    for nothing in (reading.nothing(), reading.raw([])):
        assert nothing.embeds.shape == (0, lm.hidden_size)
        assert nothing.half_tokens.dtype == np.int64
        assert Contents.joined([nothing, reading.raw([0])]).num_rows == K
