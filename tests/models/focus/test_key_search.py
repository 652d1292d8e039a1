"""Searching by cells: the exact scan's result in short histories, most of it in long ones, however they grew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from models.focus import key_search
from models.focus.allocators import ranked_by_score
from models.focus.dense import KeyIndex, KeySpace, Match
from models.focus.key_search import KeySearch
from storage.contract import TreeReader
from storage.schema import KEYS
from tests.models.focus.test_dense import sticky_keys, tree_of

DIM = 32


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Cells from 64 blocks on: 16 at first, 128 from 4,096 on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_search, "EXACT_BLOCKS", 64)
        patch.setattr(key_search, "FOLD", 16)
        patch.setattr(key_search, "PROBED_CELLS", 16)
        yield


def exact(reader: TreeReader, space: KeySpace, query: np.ndarray, match: Match, limit: int, stop: int) -> list[int]:
    scores = KeyIndex(reader, space, 0, stop, array=KEYS).scores(query, match)
    return [block for block, _ in ranked_by_score(scores, 0, limit=limit)]


def count_reads(reader: TreeReader, patch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each read from now on asks for."""
    sizes: list[int] = []
    read = reader.read

    def counted(name: str, lod: int, indices: np.ndarray) -> torch.Tensor:
        sizes.append(len(indices))
        return read(name, lod, indices)

    patch.setattr(reader, "read", counted)
    return sizes


def grouped_keys(num_keys: int, seed: int) -> np.ndarray:
    """Keys that stand together in groups, as those of texts about the same things do; some are denser than others."""
    rng = np.random.default_rng(seed)
    centres = sticky_keys(max(2, num_keys // 40), DIM, seed)
    spread = rng.uniform(0.3, 1.0, (len(centres), 1)).astype(np.float32)
    of = rng.integers(len(centres), size=num_keys)
    keys = centres[of] + spread[of] * rng.standard_normal((num_keys, DIM)).astype(np.float32) / DIM**0.5
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


@given(
    num_keys=st.integers(1, 64),
    stop=st.integers(0, 70),
    limit=st.integers(0, 8),
    match=st.sampled_from(["pooled", "max_sim"]),
    whiten=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_a_short_history_is_searched_exactly(
    num_keys: int, stop: int, limit: int, match: Match, whiten: bool, seed: int
) -> None:
    reader, query = tree_of(sticky_keys(num_keys, DIM, seed)), sticky_keys(3, DIM, seed + 1)
    space = KeySpace.of_tree(reader, array=KEYS) if whiten else KeySpace.plain(DIM)
    blocks, scores = KeySearch(reader, space, array=KEYS).best(query, match, limit, stop)
    of_all = KeyIndex(reader, space, array=KEYS).scores(query, match)
    assert len(set(blocks.tolist())) == len(blocks) == min(limit, stop, num_keys)
    assert (blocks < stop).all()
    # A product of another shape may round differently in its last bit, so equal ones may change places.
    np.testing.assert_allclose(scores, of_all[blocks], atol=2e-6)
    np.testing.assert_allclose(scores, np.sort(of_all[:stop])[::-1][:limit], atol=2e-6)


def test_of_equal_keys_the_newer_is_first() -> None:
    keys = np.repeat(sticky_keys(2, DIM, 0), [30, 20], axis=0)
    blocks, _ = KeySearch(tree_of(keys), KeySpace.plain(DIM), array=KEYS).best(keys[:1], "pooled", 5)
    assert blocks.tolist() == [29, 28, 27, 26, 25]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("match", ["pooled", "max_sim"])
def test_of_a_long_history_most_is_found(match: Match, whiten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = grouped_keys(6000, 0)
    reader = tree_of(keys)
    space = KeySpace.of_tree(reader, array=KEYS) if whiten else KeySpace.plain(DIM)
    search = KeySearch(reader, space, array=KEYS)
    num_read = count_reads(reader, monkeypatch)
    rng = np.random.default_rng(1)
    found, num_queries = {8: 0, 32: 0}, 20
    for place in rng.integers(6000, size=num_queries):
        query = keys[place] + 0.5 * rng.standard_normal((2, DIM)).astype(np.float32) / DIM**0.5
        stop = int(rng.integers(3000, 6001))
        wanted = exact(reader, space, query, match, 32, stop)
        num_read.clear()
        blocks, scores = search.best(query, match, 32, stop)
        # An eighth of the cells, one more that is opened last, and the batch that is in none.
        assert 32 <= sum(num_read) <= 0.25 * 6000
        assert (np.diff(scores) <= 0).all()
        assert len(blocks) == 32
        assert blocks.max() < stop
        for first in found:
            found[first] += len(set(wanted[:first]) & set(blocks[:first].tolist()))
    assert found[8] >= 0.9 * 8 * num_queries, found
    assert found[32] >= 0.8 * 32 * num_queries, found


@given(cuts=st.lists(st.integers(1, 700), max_size=6), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_how_a_history_grew_changes_nothing(cuts: list[int], seed: int) -> None:
    keys, query = grouped_keys(700, seed), sticky_keys(1, DIM, seed + 1)
    space = KeySpace.plain(DIM)
    sizes = [*sorted(cuts), 700]
    grown = KeySearch(tree_of(keys[: sizes[0]]), space, array=KEYS)
    for size in sizes:
        reader = tree_of(keys[:size])
        grown.follow(reader)
        fresh = KeySearch(reader, space, array=KEYS)
        assert grown.num_blocks == size
        for stop in (size, size // 2):
            for found, wanted in zip(
                grown.best(query, "pooled", 8, stop), fresh.best(query, "pooled", 8, stop), strict=True
            ):
                np.testing.assert_array_equal(found, wanted)


def test_a_turn_reads_its_own_keys_and_a_full_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = grouped_keys(1200, 0)
    search = KeySearch(tree_of(keys[:1030]), KeySpace.plain(DIM), array=KEYS)
    resident = search.resident_bytes
    assert resident <= 10 * 1030 + 64 * (4 * DIM + 8) + 8
    num_read = []
    for size in (1033, 1040, 1050):
        reader = tree_of(keys[:size])
        sizes = count_reads(reader, monkeypatch)
        search.follow(reader)
        num_read.append(sum(sizes))
    # The second fills the batch that begins at 1,024.
    assert num_read == [3, 16, 10]
    assert search.resident_bytes <= 2 * resident
    # What is in no cell yet is found all the same.
    blocks, _ = search.best(keys[1045:1046], "pooled", 1)
    assert blocks.tolist() == [1045]


def test_blocks_are_found_where_the_nearest_cells_hold_only_later_ones() -> None:
    """Two halves that have nothing in common; what is like the second is asked for in the first."""
    rng = np.random.default_rng(0)
    keys = np.zeros((800, DIM), np.float32)
    keys[:400, : DIM // 2], keys[400:, DIM // 2 :] = rng.random((2, 400, DIM // 2))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    search = KeySearch(tree_of(keys), KeySpace.plain(DIM), array=KEYS)
    blocks, _ = search.best(keys[700:701], "pooled", 20, stop_block=400)
    assert len(blocks) == 20
    assert blocks.max() < 400


def test_several_contexts_do_not_meet() -> None:
    one, other = grouped_keys(300, 0), grouped_keys(300, 1)
    searches = [KeySearch(tree_of(keys), KeySpace.plain(DIM), array=KEYS) for keys in (one, other)]
    for keys, search in zip((one, other), searches, strict=True):
        blocks, scores = search.best(keys[123:124], "pooled", 1)
        assert blocks.tolist() == [123]
        assert scores[0] == pytest.approx(1, abs=1e-3)


def test_what_cannot_be_compared_is_refused() -> None:
    keys = sticky_keys(4, DIM, 0)
    with pytest.raises(ModelError, match="dimensions"):
        KeySearch(tree_of(keys), KeySpace.plain(6), array=KEYS)
    search = KeySearch(tree_of(keys), KeySpace.plain(DIM), array=KEYS)
    with pytest.raises(ModelError, match="dimensions"):
        search.best(keys[:, :5], "pooled", 1)
    with pytest.raises(ModelError, match="at least one token"):
        search.best(keys[:0], "pooled", 1)
    with pytest.raises(ModelError, match="no match 'sum'"):
        search.best(keys, "sum", 1)  # type: ignore[arg-type]
