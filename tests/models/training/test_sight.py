"""Cuts and masks: every block before is represented, nothing behind is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from models.training.sight import Sight, random_sight


@st.composite
def sights(draw: st.DrawFn) -> tuple[Sight, int, bool]:
    """A random sight, the longest chunk it was cut into, and whether it is of overlays."""
    most, overlay = draw(st.integers(1, 5)), draw(st.booleans())
    return (
        random_sight(
            draw(st.integers(1, 3)),
            draw(st.integers(2, 9)),
            np.random.default_rng(draw(st.integers(0, 2**32))),
            max_tail_blocks=most,
            shown_share=draw(st.sampled_from([0.0, 0.3, 1.0])),
            overlay=overlay,
        ),
        most,
        overlay,
    )


@given(drawn=sights())
@settings(deadline=None)
def test_every_block_before_is_seen_and_none_behind(drawn: tuple[Sight, int, bool]) -> None:
    sight, most, overlay = drawn
    n = sight.num_blocks
    for row in range(len(sight.gist)):
        for i in range(n):
            for j in range(n):
                gist, raw = sight.gist[row, i, j], sight.raw[row, i, j]
                assert (gist or raw) == (j < i)
                assert not (raw and j == 0)
                if not overlay:
                    assert not (gist and raw)
            tail = sight.tail_tokens()[row, i]
            assert tail == K * sum(sight.raw[row, i, j:i].all() for j in range(i))
    # What is a tail without being shown is at most a chunk.
    unshown = sight.raw & ~sight.gist
    if overlay:
        assert unshown.sum(axis=2).max() < most


@given(drawn=sights(), num_vectors=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_the_mask_says_the_same_of_every_entry(drawn: tuple[Sight, int, bool], num_vectors: int) -> None:
    sight = drawn[0]
    n = sight.num_blocks
    entries = [("gist", j // num_vectors, j % num_vectors) for j in range(n * num_vectors)]
    entries += [("raw", j // K, j % K) for j in range(K, n * K)]
    mask = sight.mask(num_vectors).numpy()
    assert mask.shape == (len(sight.gist), 1, len(entries), len(entries))
    rng = np.random.default_rng(0)
    for row, seeing, seen in zip(*(rng.integers(0, size, 500) for size in np.delete(mask.shape, 1)), strict=True):
        (kind, i, at), (other, j, place) = entries[seeing], entries[seen]
        if kind == "gist":
            expected = other == "gist" and (j, place) <= (i, at)
        elif other == "gist":
            expected = sight.gist[row, i, j]
        else:
            expected = sight.raw[row, i, j] or (i == j and place <= at)
        assert mask[row, 0, seeing, seen] == expected


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_older_super_blocks_are_seen_as_nodes(overlay: bool, num_vectors: int) -> None:
    n, m, q = 70, num_vectors, 2
    rng = np.random.default_rng(3)
    sight = random_sight(4, n, rng, max_tail_blocks=4, shown_share=0.3, overlay=overlay)
    assert sight.node is not None
    assert sight.num_nodes == q
    seen = {0: 0, 1: 0, 2: 0}
    for row in range(4):
        for i in range(n):
            nodes = int(sight.node[row, i].sum())
            assert (sight.node[row, i] == (np.arange(q) < nodes)).all()
            assert 32 * nodes <= i
            seen[nodes] += 1
            under = np.arange(n) < 32 * nodes
            represented = under | sight.gist[row, i] | sight.raw[row, i]
            assert (represented == (np.arange(n) < i)).all()
            assert not sight.gist[row, i][under].any()
            if not overlay:
                assert not sight.raw[row, i][under].any()
    assert min(seen.values()) > 0
    assert (sight.sees_nodes() == sight.node.any(axis=2)).all()
    mask = sight.mask(m).numpy()
    entries = [("node", j // m, j % m) for j in range(q * m)] + [("gist", j // m, j % m) for j in range(n * m)]
    entries += [("raw", j // K, j % K) for j in range(K, n * K)]
    assert mask.shape == (4, 1, len(entries), len(entries))
    # Of gists all pairs, of raw entries a sample.
    num_gists = (q + n) * m
    pairs = [(a, b) for a in range(num_gists) for b in range(num_gists + 3)]
    pairs += [(int(a), int(b)) for a, b in rng.integers(num_gists, len(entries), (1500, 2))]
    pairs += [(int(a), int(b)) for a, b in rng.integers((num_gists, 0), (len(entries), num_gists), (1500, 2))]
    for seeing, other in pairs:
        (kind, i, at), (what, j, place) = entries[seeing], entries[other]
        expected = {
            ("node", "node"): (j, place) <= (i, at),
            ("gist", "node"): kind == "gist" and j < i // 32,
            ("gist", "gist"): i // 32 == j // 32 and (j, place) <= (i, at),
            ("raw", "node"): kind == "raw" and what == "node" and bool(sight.node[0, i, j]),
            ("raw", "gist"): kind == "raw" and what == "gist" and bool(sight.gist[0, i, j]),
            ("raw", "raw"): kind == what == "raw" and bool(sight.raw[0, i, j] or (i == j and place <= at)),
        }.get((kind, what), False)
        assert mask[0, 0, seeing, other] == expected, (entries[seeing], entries[other])


@pytest.mark.parametrize("num_blocks", [9, 70])
def test_a_second_working_context_sees_nothing_of_the_first(num_blocks: int) -> None:
    rng = np.random.default_rng(5)
    sight = Sight.stacked(
        [random_sight(1, num_blocks, rng, max_tail_blocks=3, shown_share=0.2, restart_share=0.7) for _ in range(40)]
    )
    assert sight.begins is not None
    starts = sight.begins.max(axis=1)
    assert 20 <= (starts > 0).sum() < 40
    assert len(set(starts.tolist())) > 5
    mask, q = sight.mask(1).numpy()[:, 0], sight.num_nodes
    for row, start in enumerate(starts):
        assert (sight.begins[row] == np.where(np.arange(num_blocks) < start, 0, start)).all()
        seen = sight.gist[row] | sight.raw[row]
        if sight.node is not None:
            seen |= _under(sight.node[row])
        own = np.tril(np.ones((num_blocks, num_blocks), bool), -1)
        own[start:, :start] = False
        assert (seen == own).all(), "all of its own Working Context, and nothing of the other"
        gists = mask[row, q : q + num_blocks, q : q + num_blocks]
        assert not gists[start:, :start].any()
        assert gists[:start, :start].any() == (start > 0)
        raw_from = q + num_blocks
        old = slice(raw_from, raw_from + max(0, start - 1) * K)
        assert not mask[row, raw_from + max(0, start - 1) * K :, old].any() or start == 0
    tokens = sight.tail_tokens()
    assert (tokens <= K * (np.arange(num_blocks) - sight.begins)).all()


def _under(node: np.ndarray) -> np.ndarray:
    """Blocks that the nodes each block sees stand for: `(n, n)`."""
    n = len(node)
    blocks = np.zeros((n, n), bool)
    blocks[:, : 32 * node.shape[1]] = node.repeat(32, axis=1)
    return blocks


def test_a_band_says_the_same_as_the_mask_where_working_contexts_begin_anew() -> None:
    sight = random_sight(6, 12, np.random.default_rng(1), max_tail_blocks=3, restart_share=1.0)
    assert sight.begins is not None
    band = sight.banded_mask(2)
    whole = sight.mask(2)
    assert torch.equal(band.summaries, whole[:, 0, :24, :24])
    seen = whole[:, 0, 24:, :24][:, ::K]
    assert torch.equal(band.to_summaries, seen)


def test_without_restarts_the_same_cuts_are_drawn() -> None:
    with_none = random_sight(3, 9, np.random.default_rng(1), max_tail_blocks=3)
    anew = random_sight(3, 9, np.random.default_rng(1), max_tail_blocks=3, restart_share=1.0)
    assert with_none.begins is None
    assert anew.begins is not None
    kept = np.arange(9) >= anew.begins[:, :, None]
    assert (anew.gist == (with_none.gist & kept)).all()


def test_windows_of_one_super_block_have_no_nodes() -> None:
    sight = random_sight(1, 32, np.random.default_rng(0), max_tail_blocks=2)
    assert sight.node is None
    assert not sight.sees_nodes().any()


def test_chunks_of_all_lengths_come_up_and_shares_are_met() -> None:
    sight = random_sight(64, 16, np.random.default_rng(0), max_tail_blocks=4, shown_share=0.25)
    tails = sight.tail_tokens()[:, 1:]
    assert set(tails.ravel().tolist()) >= {0, K, 2 * K, 3 * K}
    earlier = sight.gist[:, :, 1:]
    assert 0.2 < (earlier & sight.raw[:, :, 1:]).sum() / earlier.sum() < 0.3
    # All blocks of a chunk have the same blocks shown.
    for row in range(64):
        for i in range(2, 16):
            if sight.raw[row, i, i - 1] and not sight.gist[row, i, i - 1]:
                assert (sight.gist[row, i] == sight.gist[row, i - 1]).all()
                shown = sight.raw & sight.gist
                assert (shown[row, i] == shown[row, i - 1]).all()


def test_the_same_seed_cuts_the_same() -> None:
    first, again, other = (random_sight(2, 8, np.random.default_rng(s), max_tail_blocks=3) for s in (1, 1, 2))
    assert (first.raw == again.raw).all()
    assert (first.raw != other.raw).any()


@pytest.mark.parametrize("num_blocks", [8, 64])
@pytest.mark.parametrize("max_gists", [1, 3, 40])
def test_only_the_newest_gists_are_seen_where_there_is_a_limit(num_blocks: int, max_gists: int) -> None:
    every, few = (
        random_sight(4, num_blocks, np.random.default_rng(5), max_tail_blocks=3, max_gists=limit)
        for limit in (None, max_gists)
    )
    assert (every.raw == few.raw).all()
    first = np.arange(num_blocks) - every.tail_tokens() // K  # of each block's chunk
    for row in range(4):
        for block in range(num_blocks):
            oldest = first[row, block] - max_gists
            assert (few.gist[row, block] == (every.gist[row, block] & (np.arange(num_blocks) >= oldest))).all()
            if every.node is not None and few.node is not None:
                inside = 32 * np.arange(every.node.shape[2]) >= oldest
                assert (few.node[row, block] == (every.node[row, block] & inside)).all()
