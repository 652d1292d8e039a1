"""What retrievers find: the planted needle, blocks in range, orders that equal plain computations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.retrieval import RANKED_BLOCKS, Retrieval, fused, shortlist
from actors.evaluation.rivals import BM25, RECENCY, Condition, bare_rows, contents_of
from actors.evaluation.scorer import BlockCaches, Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from models.focus.dense import KeySpace, dense_scores, query_states
from models.focus.history import History
from storage.schema import KEYS
from tests.actors.evaluation.support import NEEDLE, StoredText, plain_nll, stored, text_with_needle

NEEDLE_BLOCK = 9
STOP = 28
TAIL_BLOCKS = 2


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    """A needle in block 9; block 27, the history's last, asks for it."""
    before = text_with_needle(STOP, NEEDLE_BLOCK, end=" and now of the quokka in zanzibar")
    with stored(tiny_lm_config, tmp_path_factory.mktemp("retrieval"), [before + "x" * 300]) as tree:
        yield tree


@pytest.fixture
def retrieval(lm: BaseLM, tree: StoredText) -> Retrieval:
    reading = Reading(lm, tree.reader, History.of(tree.reader, 1, STOP))
    space = KeySpace.of_tree(tree.reader, array=KEYS)
    return Retrieval(reading, tree.lexical, tree.plan.tokenizer, tree.gistnet, space, STOP - TAIL_BLOCKS, 32)


def test_the_text_is_as_planned(retrieval: Retrieval) -> None:
    tokenizer = retrieval.tokenizer
    assert tokenizer.decode(retrieval.reading.ids(NEEDLE_BLOCK, 1)) == f"{NEEDLE} "
    assert tokenizer.decode(retrieval.reading.ids(STOP - 1, 1)).endswith("quokka in zanzibar")


def test_bm25_finds_the_needle_and_recency_misses_it(retrieval: Retrieval) -> None:
    found = retrieval.bm25()
    assert found[0] == (NEEDLE_BLOCK, 0)
    budget, tail, needle_place = 8 * K, TAIL_BLOCKS * K, 2 * (NEEDLE_BLOCK - 1) * K
    for form in ("raw", "overlay"):
        shown = {}
        for chooser in (BM25, RECENCY):
            rows, picked = contents_of(Condition(chooser, form), retrieval.reading, found, budget, tail, 2)
            assert rows.num_rows <= budget
            shown[chooser] = set(range(needle_place, needle_place + 2 * K, 2)) <= set(rows.half_tokens.tolist())
            assert (NEEDLE_BLOCK in picked) == (chooser == BM25)
        assert shown == {BM25: True, RECENCY: False}


def test_the_tail_is_never_found(retrieval: Retrieval) -> None:
    """Its own words are in it, and in range only while it is no tail."""
    everywhere = replace(retrieval, shown_from=STOP)
    assert everywhere.bm25()[0][0] == STOP - 1
    for found in (retrieval.bm25(), retrieval.dense(), retrieval.random(3)):
        blocks = [block for block, _ in found]
        assert len(set(blocks)) == len(blocks) <= RANKED_BLOCKS
        assert all(1 <= block < STOP - TAIL_BLOCKS for block in blocks)


def test_nothing_before_the_tail_finds_nothing(retrieval: Retrieval) -> None:
    bare = replace(retrieval, shown_from=1)
    caches = BlockCaches(bare.reading.lm, bare.reading.nothing(), [], bare.reading.history.num_tokens)
    assert list(bare.bm25()) == list(bare.dense()) == list(bare.random(0)) == list(bare.reranked([], caches)) == []


def test_dense_orders_by_the_cosines_of_stored_keys(retrieval: Retrieval, lm: BaseLM, tree: StoredText) -> None:
    blocks = np.arange(1, STOP - TAIL_BLOCKS)
    states = query_states(lm, tree.gistnet, retrieval.reading.ids(STOP - 16, 16), 16)
    space = retrieval.key_space
    scores = dense_scores(tree.reader.read(KEYS, 1, blocks)[:, 0], states, "pooled", space.centre, space.whitening)
    assert [block for block, _ in retrieval.dense()] == blocks[np.argsort(-scores)].tolist()


def test_random_is_a_permutation_that_the_seed_decides(retrieval: Retrieval) -> None:
    first = retrieval.random(1)
    assert sorted(block for block, _ in first) == list(range(1, STOP - TAIL_BLOCKS))
    assert first == retrieval.random(1) != retrieval.random(2)


def test_reranking_is_by_the_exact_likelihood_of_the_tail(retrieval: Retrieval, lm: BaseLM) -> None:
    """One block behind stand-ins has seen all it would see in a single pass, so the choice is exact."""
    reading = retrieval.reading
    num_tokens = reading.history.num_tokens
    stand_ins, _ = bare_rows(reading, 300, TAIL_BLOCKS * K)
    blocks = [3, 20, NEEDLE_BLOCK, 14, 1, 8, 24, 11, 17, 6]
    rows = [reading.raw([block]) for block in blocks]
    found = retrieval.reranked(blocks, BlockCaches(lm, stand_ins, rows, num_tokens))
    query = reading.ids(STOP - 2, 2)[-33:]
    nll = [plain_nll(lm, Contents.joined([stand_ins, row]), query, num_tokens).mean() for row in rows]
    assert [block for block, _ in found] == [blocks[i] for i in np.argsort(nll)]
    assert np.ptp(nll) > 0.01
    best = Contents.joined([stand_ins, reading.raw([found[0][0]])])
    assert Scorer(lm).nll(best, query, num_tokens).mean() == pytest.approx(min(nll), abs=1e-4)


def test_fusion_prefers_what_both_found() -> None:
    left = [(block, 0) for block in range(100)]
    right = [(block, 0) for block in (50, 200, 201, 202)]
    found = fused([left, right])
    assert len(found) == RANKED_BLOCKS
    assert found[0] == (50, 0)
    assert fused([left, []])[:3] == left[:3]


rankings_of = st.lists(
    st.lists(st.integers(0, 80), max_size=40, unique=True).map(lambda blocks: [(block, 0) for block in blocks]),
    max_size=5,
)


@given(rankings=rankings_of, picks=st.integers(0, 10), size=st.integers(1, 40))
@settings(deadline=None, max_examples=300)
def test_the_shortlist_holds_all_picks_and_no_more_than_its_size(
    rankings: list[list[tuple[int, int]]], picks: int, size: int
) -> None:
    wanted = {block for ranking in rankings for block, _ in ranking[:picks]}
    everything = {block for ranking in rankings for block, _ in ranking}
    if len(wanted) > size:
        with pytest.raises(ValueError, match="shortlist"):
            shortlist(rankings, picks, size)
        return
    chosen = shortlist(rankings, picks, size)
    assert len(set(chosen)) == len(chosen) == min(size, len(everything))
    assert wanted <= set(chosen) <= everything
    # Filled up from each in turn: nobody's block is passed over for a deeper one of another.
    depths = {block: min(r.index((block, 0)) for r in rankings if (block, 0) in r) for block in everything}
    left_out = [depths[block] for block in everything - set(chosen)]
    deepest = max((depths[block] for block in set(chosen) - wanted), default=0)
    assert not left_out or deepest <= min(left_out)
