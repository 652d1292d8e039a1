"""Places: reproducible, inside their documents, horizons apart, histories shared as promised."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.evaluation.places import Place, blocks_of_highest_node, choose_places
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from storage.contract import TreeReader
from tests.models.focus.trees import make_tree

READER = make_tree([40 * K, 5, 900, 33 * K + 7, 64 * K, 100, 20 * K], max_lod=1).reader()


def chosen(reader: TreeReader = READER, num_places: int = 1000, seed: int = 0, **options: int | bool) -> list[Place]:
    fields = {"history_tokens": 512, "horizon_tokens": 64, "within_document": False, "max_per_document": 3}
    return choose_places(reader, num_places, **{**fields, **options}, seed=seed)  # type: ignore[arg-type]


@given(
    history_blocks=st.integers(1, 30),
    horizon_tokens=st.integers(4, 400),
    within=st.booleans(),
    max_per_document=st.integers(1, 6),
    per_history=st.integers(1, 4),
    num_places=st.integers(2, 40),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=300)
def test_places_are_what_they_promise(
    history_blocks: int,
    horizon_tokens: int,
    within: bool,
    max_per_document: int,
    per_history: int,
    num_places: int,
    seed: int,
) -> None:
    options = {
        "history_tokens": history_blocks * K,
        "horizon_tokens": horizon_tokens,
        "within_document": within,
        "max_per_document": max_per_document,
        "places_per_history": per_history,
    }
    try:
        places = chosen(num_places=num_places, seed=seed, **options)
    except ConfigError:
        assume(False)
        raise
    assert places == chosen(num_places=num_places, seed=seed, **options)
    assert [place.number for place in places] == list(range(len(places)))
    assert len(places) <= num_places
    # More places of the same choice begin with these, so that a run can be extended.
    assert chosen(num_places=num_places + 7, seed=seed, **options)[: len(places)] == places

    num_horizon = -(-horizon_tokens // K)
    documents = {document.meta.uri: document for document in READER.documents()}
    for place in places:
        document = documents[place.uri]
        start, stop = document.first_block, document.first_block + document.num_blocks
        assert start < place.stop_block
        # Before the last block, which may be short.
        assert place.stop_block + num_horizon < stop
        assert place.first_block >= (start if within else 0)
        assert 0 < place.stop_block - place.first_block <= history_blocks
    horizons = sorted((place.stop_block, place.stop_block + num_horizon) for place in places)
    assert all(left[1] <= right[0] for left, right in pairwise(horizons))

    histories: dict[int, list[int]] = {}
    of_document: dict[str, set[int]] = {}
    for place in places:
        histories.setdefault(place.first_block, []).append(place.stop_block)
        of_document.setdefault(place.uri, set()).add(place.first_block)
    assert max(map(len, of_document.values())) <= max_per_document
    spacing = max(8, num_horizon)
    for first, stops in list(histories.items())[:-1]:
        # The last may be cut short by num_places.
        assert stops == [first + history_blocks - spacing * back for back in range(per_history - 1, -1, -1)]


@pytest.mark.parametrize(
    ("history_tokens", "expected"),
    [(32, 1), (992, 1), (1024, 32), (4096, 32), (32736, 32), (32768, 1024), (131072, 1024), (1 << 20, 32768)],
)
def test_the_highest_node_that_so_many_slots_hold(history_tokens: int, expected: int) -> None:
    assert blocks_of_highest_node(history_tokens) == expected


@given(
    history_blocks=st.integers(1, 60),
    begin_blocks=st.sampled_from([1, 4, 8, 32]),
    align_blocks=st.sampled_from([1, 8, 32]),
    per_history=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_histories_begin_at_multiples_and_are_longer_by_what_that_takes(
    history_blocks: int, begin_blocks: int, align_blocks: int, per_history: int, seed: int
) -> None:
    options: dict[str, Any] = {
        "history_tokens": history_blocks * K,
        "places_per_history": per_history,
        "align_blocks": align_blocks,
    }
    try:
        plain = chosen(seed=seed, **options)
    except ConfigError:
        assume(False)
        raise
    places = chosen(seed=seed, begin_blocks=begin_blocks, **options)
    # The same horizons of the same documents: only the beginning differs.
    assert [(p.number, p.uri, p.stop_block) for p in places] == [(p.number, p.uri, p.stop_block) for p in plain]
    for place, before in zip(places, plain, strict=True):
        assert before.first_block % align_blocks == 0
        assert place.first_block % begin_blocks == 0
        assert 0 <= before.first_block - place.first_block < begin_blocks
    assert places == chosen(seed=seed, begin_blocks=begin_blocks, **options)


def test_another_seed_chooses_other_places() -> None:
    assert chosen(seed=1, num_places=4) != chosen(seed=2, num_places=4)


def test_histories_within_a_document() -> None:
    places = chosen(within_document=True)
    documents = {document.meta.uri: document for document in READER.documents()}
    assert {place.uri for place in places} == {f"file:///doc{i}" for i in (0, 2, 3, 4, 6)}
    assert all(place.first_block >= documents[place.uri].first_block for place in places)


def test_too_short_a_context_says_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"0 place\(s\) with 65536 \+ 64 tokens.*evaluation.history_tokens"):
        chosen(history_tokens=65536)


def test_places_that_share_more_than_the_history_are_refused() -> None:
    # Horizons of 32 blocks lie 32 blocks apart: four of them need 96 blocks before the last.
    with pytest.raises(ConfigError, match="places_per_history"):
        chosen(history_tokens=64 * K, horizon_tokens=32 * K, places_per_history=4)
