"""Grids of questions: reproducible, inside the context, where something can be planted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.task_places import (
    TASK_DEPTH,
    block_sizes,
    choose_task_places,
    in_groups,
    move_needles,
    needle_places,
)
from actors.tasks.ask_again import AskAgain
from actors.tasks.recall import KeyValueRecall
from actors.tasks.sample import Needle, NumberedTask
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from tests.models.focus.trees import make_tree

TASKS: dict[str, NumberedTask] = {"recall": KeyValueRecall("recall", paraphrased=False), "ask_again": AskAgain()}


def test_a_grid_is_reproducible_and_grows_behind_its_end() -> None:
    reader = make_tree([90 * 1024, 17, 40 * 1024 + 5]).reader()

    def grid(num_samples: int, seed: int = 0) -> list:
        return choose_task_places(reader, TASKS, num_samples, [4096, 0, 16384], [0, 100], tail_tokens=64, seed=seed)

    places = grid(6)
    assert places == grid(6)
    assert places != grid(6, seed=1)
    assert grid(8)[: len(places)] == places
    assert [place.number for place in places] == list(range(6 * 2 * 3 * 2))
    whole = reader.version.num_blocks // K * K
    for place in places:
        assert place.stop_block - place.first_block == place.history_tokens // K
        assert place.first_block >= 0
        assert place.stop_block <= whole
        assert place.first_block % K == 0
        assert len(needle_places(block_sizes(reader), place.first_block, place.stop_block, 64))
    assert {place.history_tokens for place in places} == {4096, 16384, whole * K}
    # One history for a sample's tasks and depths, and for the turns of a session.
    ends = {(p.task, p.sample, p.history_tokens): p.stop_block for p in places}
    assert len(ends) == 36
    assert len({ends["ask_again", sample, 4096] for sample in range(5)}) == 1
    assert len({ends["recall", sample, 4096] for sample in range(6)}) > 1
    groups = in_groups(places, TASKS)
    assert sorted(place.number for group in groups for place in group) == list(range(len(places)))
    assert max(map(len, groups)) == 10


def test_without_depths_needles_stay() -> None:
    reader = make_tree([8 * 1024]).reader()
    places = choose_task_places(reader, TASKS, 2, [2048], [], tail_tokens=64, seed=0)
    assert {place.depth_percent for place in places} == {TASK_DEPTH}


@pytest.mark.parametrize(("documents", "length"), [([8 * 1024], 16384), ([100], 0), ([700] * 30, 4096)])
def test_contexts_without_room_are_refused(documents: list[int], length: int) -> None:
    reader = make_tree(documents).reader()
    with pytest.raises(ConfigError, match="histor"):
        choose_task_places(reader, TASKS, 2, [length], [], tail_tokens=64, seed=0)


def test_nothing_is_planted_in_the_tail_unless_there_is_nothing_else() -> None:
    counts = np.full(4 * K, K)
    counts[40] = 7
    assert needle_places(counts, 0, 128, 64).tolist() == [0, 2]
    assert needle_places(counts, 64, 128, 32 * 33).tolist() == [2, 3]
    assert needle_places(counts, 96, 128, 64).tolist() == [3]


@settings(deadline=None)
@given(
    depths=st.lists(st.floats(0, 0.999), min_size=1, max_size=9),
    needed=st.data(),
    depth=st.floats(0, 1),
)
def test_moved_needles_keep_their_order(depths: list[float], needed: st.DataObject, depth: float) -> None:
    chosen = needed.draw(st.sets(st.integers(0, len(depths) - 1), min_size=1))
    needles = [Needle(str(i), d, i in chosen) for i, d in enumerate(sorted(depths))]
    moved = move_needles(needles, depth)
    assert [needle.text for needle in moved] == [needle.text for needle in needles]
    places = [needle.depth for needle in moved]
    assert all(low <= high + 1e-12 for low, high in pairwise(places))
    assert all(-1e-12 <= place <= 1 + 1e-12 for place in places)
    if len(chosen) == 1:
        assert places[chosen.pop()] == pytest.approx(depth)
