"""What retrievers find: the planted needle, blocks in range, orders that equal plain computations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.retrieval import RANKED_BLOCKS, Retrieval, shortlist
from actors.evaluation.rivals import BM25, RECENCY, Condition, bare_rows, contents_of
from actors.evaluation.scorer import BlockCaches, Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.evaluation_config import RetrievalConfig, Searcher
from models.base_lm import BaseLM
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeySpace, dense_scores, query_states
from models.focus.history import History
from models.sentence_encoder import VECTOR_DIM
from storage.lexical.search import LexicalParameters
from storage.schema import KEYS
from tests.actors.evaluation.support import NEEDLE, StoredText, plain_nll, stored, text_with_needle

NEEDLE_BLOCK = 9
STOP = 28
TAIL_BLOCKS = 2
CONFIG = RetrievalConfig(
    bm25_query_tokens=32,
    dense_query_tokens=16,
    minilm_query_tokens=40,
    rerank_query_tokens=32,
    fusion=["bm25", "dense"],
    fusion_constant=60.0,
)


class Letters:
    """Encodes a text as how often each letter is in it, and remembers what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        vectors = np.zeros((len(texts), VECTOR_DIM), np.float32)
        for row, text in enumerate(texts):
            np.add.at(vectors[row], np.frombuffer(text.encode(), np.uint8), 1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


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
    embeddings = BlockEmbeddings(Letters(), tree.plan.tokenizer.decode_batch, tree.reader)
    shown_from = STOP - TAIL_BLOCKS
    return Retrieval(reading, tree.lexical, tree.plan.tokenizer, tree.gistnet, space, shown_from, CONFIG, embeddings)


def newest_text(retrieval: Retrieval, num_tokens: int) -> str:
    return retrieval.tokenizer.decode(retrieval.reading.ids(1, STOP - 1)[-num_tokens:])


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
    for found in (retrieval.bm25(), retrieval.dense(), retrieval.minilm(), retrieval.random(3)):
        blocks = [block for block, _ in found]
        assert len(set(blocks)) == len(blocks) <= RANKED_BLOCKS
        assert all(1 <= block < STOP - TAIL_BLOCKS for block in blocks)


def test_nothing_before_the_tail_finds_nothing(retrieval: Retrieval) -> None:
    bare = replace(retrieval, shown_from=1)
    caches = BlockCaches(bare.reading.lm, bare.reading.nothing(), [], bare.reading.history.num_tokens)
    everyone = ("bm25", "dense", "minilm", "fusion", "random")
    found = bare.find(everyone, 0).ranked
    assert set(found) == set(everyone)
    assert not any(map(len, found.values()))
    assert list(bare.reranked([], caches)) == []


@pytest.mark.parametrize("num_query", [1, 16, 100])
def test_dense_orders_by_the_cosines_of_stored_keys(
    retrieval: Retrieval, lm: BaseLM, tree: StoredText, num_query: int
) -> None:
    blocks = np.arange(1, STOP - TAIL_BLOCKS)
    states = query_states(lm, tree.gistnet, retrieval.reading.ids(STOP - 16, 16), num_query)
    space = retrieval.key_space
    scores = dense_scores(tree.reader.read(KEYS, 1, blocks)[:, 0], states, "pooled", space.centre, space.whitening)
    asking = replace(retrieval, config=replace(CONFIG, dense_query_tokens=num_query))
    found = [block for block, _ in asking.dense()]
    assert found == blocks[np.argsort(-scores)].tolist()


@pytest.mark.parametrize(
    ("num_query", "k1", "b"), [(32, 1.2, 0.75), (64, 1.2, 0.75), (32, 0.0, 0.0), (300, 3.0, 0.0), (300, 0.5, 1.0)]
)
def test_bm25_asks_with_the_newest_tokens_and_the_parameters_given(
    retrieval: Retrieval, tree: StoredText, num_query: int, k1: float, b: float
) -> None:
    config = replace(CONFIG, bm25_query_tokens=num_query, bm25_k1=k1, bm25_b=b)
    blocks, _ = tree.lexical.search(
        tree.reader, newest_text(retrieval, num_query), 64, 1, STOP - TAIL_BLOCKS, parameters=LexicalParameters(k1, b)
    )
    found = replace(retrieval, config=config).bm25()
    assert found == [(block, 0) for block in blocks.tolist()]
    assert (len(found) > 1) == (num_query == 300)


def test_bm25_parameters_do_matter(retrieval: Retrieval) -> None:
    everything = replace(retrieval, question=retrieval.reading.ids(1, STOP - 1))

    def order(k1: float, b: float) -> list[tuple[int, int]]:
        return list(replace(everything, config=replace(CONFIG, bm25_k1=k1, bm25_b=b)).bm25())

    assert order(0.0, 0.0) == order(0.0, 1.0) != order(1.2, 1.0) != order(1.2, 0.0)


@pytest.mark.parametrize("num_query", [5, 40])
def test_minilm_orders_by_the_cosines_of_sentence_vectors(retrieval: Retrieval, num_query: int) -> None:
    encoder = Letters()
    embeddings = BlockEmbeddings(encoder, retrieval.tokenizer.decode_batch, retrieval.reading.reader)
    config = replace(CONFIG, minilm_query_tokens=num_query)
    found = replace(retrieval, embeddings=embeddings, config=config).minilm()
    texts = [retrieval.tokenizer.decode(retrieval.reading.ids(block, 1)) for block in range(1, STOP - TAIL_BLOCKS)]
    assert sorted(encoder.texts) == sorted([*texts, newest_text(retrieval, num_query)])
    cosines = Letters().encode(texts) @ Letters().encode([newest_text(retrieval, num_query)])[0]
    # Ties are anyone's.
    assert sorted(block for block, _ in found) == list(range(1, STOP - TAIL_BLOCKS))
    np.testing.assert_allclose(cosines[[block - 1 for block, _ in found]], -np.sort(-cosines), atol=1e-6)
    assert np.ptp(cosines) > 0.1


def test_a_question_alone_asks(retrieval: Retrieval, lm: BaseLM, tree: StoredText) -> None:
    """However many tokens a history's end would be asked for; what is before it is context of the states only."""
    question = tree.plan.tokenizer.encode(" What of Zanzibar and of the quokka there?").astype(np.int64)
    asking = replace(retrieval, question=question)
    assert asking.bm25()[0] == (NEEDLE_BLOCK, 0)
    encoder = Letters()
    asking = replace(
        asking, embeddings=BlockEmbeddings(encoder, tree.plan.tokenizer.decode_batch, retrieval.reading.reader)
    )
    assert [block for block, _ in asking.minilm()] != [block for block, _ in retrieval.minilm()]
    assert encoder.texts[0] == " What of Zanzibar and of the quokka there?"
    context = np.concatenate([retrieval.reading.ids(STOP - 20, 20), question])[-512:]
    states = query_states(lm, tree.gistnet, context, len(question))
    blocks = np.arange(1, STOP - TAIL_BLOCKS)
    space = retrieval.key_space
    scores = dense_scores(tree.reader.read(KEYS, 1, blocks)[:, 0], states, "pooled", space.centre, space.whitening)
    assert [block for block, _ in asking.dense()] == blocks[np.argsort(-scores)].tolist()


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


def fused_by_hand(rankings: Sequence[Sequence[tuple[int, int]]], constant: float) -> list[tuple[int, int]]:
    """Cormack et al. 2009: the sum of 1 / (k + rank), ranks from 1."""
    scores: dict[tuple[int, int], float] = {}
    for ranking in rankings:
        for rank, pair in enumerate(ranking):
            scores[pair] = scores.get(pair, 0) + 1 / (constant + rank + 1)
    return sorted(scores, key=lambda pair: (-round(scores[pair], 12), pair))[:RANKED_BLOCKS]


@pytest.mark.parametrize(
    ("members", "constant"),
    [(["bm25", "dense"], 60.0), (["bm25", "dense", "minilm"], 60.0), (["bm25", "minilm"], 0.0), (["dense"], 60.0)],
)
def test_fusion_is_of_what_the_config_names(retrieval: Retrieval, members: list[Searcher], constant: float) -> None:
    config = replace(CONFIG, fusion=members, fusion_constant=constant, bm25_query_tokens=64)
    found = replace(retrieval, config=config).find(["fusion"], 0)
    assert set(found.ranked) == {*members, "fusion"}
    by_hand = fused_by_hand([found.ranked[name] for name in members], constant)
    # Ties are anyone's.
    assert sorted(found.ranked["fusion"]) == sorted(by_hand)
    ranks = [{pair: rank for rank, pair in enumerate(found.ranked[name])} for name in members]
    scores = [sum(1 / (constant + r[p] + 1) for r in ranks if p in r) for p in found.ranked["fusion"]]
    np.testing.assert_allclose(scores, sorted(scores, reverse=True), rtol=1e-9)


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ((), ()),
        (("recency", "full", "uniform", "exhaustive"), ()),
        (("random",), ("random",)),
        (("bm25",), ("bm25",)),
        (("minilm", "random"), ("minilm", "random")),
        (("fusion",), ("bm25", "dense", "fusion")),
        (("rerank",), ("bm25", "dense", "fusion")),
        (("oracle", "minilm"), ("bm25", "dense", "minilm", "fusion")),
        (("oracle_greedy",), ("bm25", "dense", "fusion")),
    ],
)
def test_what_is_found_is_what_is_wanted_and_what_that_is_made_of(
    retrieval: Retrieval, wanted: tuple[str, ...], made: tuple[str, ...]
) -> None:
    found = retrieval.find(wanted, 7)
    assert set(found.ranked) == set(found.seconds) == set(made)
    plain = {"bm25": retrieval.bm25, "dense": retrieval.dense, "minilm": retrieval.minilm}
    for name in made:
        if name in plain:
            assert found.ranked[name] == plain[name]()
    if "random" in made:
        assert found.ranked["random"] == retrieval.random(7)
    if "fusion" in made:
        # What a ranking builds on is part of its price.
        assert found.seconds["fusion"] >= found.seconds["bm25"] + found.seconds["dense"]


def test_fusion_prefers_what_both_found(retrieval: Retrieval) -> None:
    found = retrieval.find(["fusion"], 0)
    assert found.ranked["bm25"][0] == (NEEDLE_BLOCK, 0)
    # One hit alone, so all others have what dense search says of them.
    assert found.ranked["fusion"][0] == (NEEDLE_BLOCK, 0)
    rest = [pair for pair in found.ranked["dense"] if pair not in found.ranked["bm25"]]
    assert [pair for pair in found.ranked["fusion"] if pair in rest] == rest


rankings_of = st.lists(
    st.lists(st.integers(0, 80), max_size=40, unique=True).map(lambda blocks: [(block, 0) for block in blocks]),
    max_size=5,
)


@given(
    rankings=rankings_of,
    then=st.lists(st.integers(0, 80), max_size=20, unique=True),
    picks=st.integers(0, 10),
    size=st.integers(1, 40),
)
@settings(deadline=None, max_examples=300)
def test_the_shortlist_is_all_picks_and_then_what_still_fits(
    rankings: list[list[tuple[int, int]]], then: list[int], picks: int, size: int
) -> None:
    wanted = {block for ranking in rankings for block, _ in ranking[:picks]}
    if len(wanted) > size:
        with pytest.raises(ValueError, match="shortlist"):
            shortlist(rankings, picks, size, [(block, 0) for block in then])
        return
    chosen = shortlist(rankings, picks, size, [(block, 0) for block in then])
    assert len(set(chosen)) == len(chosen) <= size
    # Nothing but the picks where nothing else is asked for.
    assert chosen[: len(wanted)] == shortlist(rankings, picks, size)
    assert set(chosen[: len(wanted)]) == wanted
    new = [block for block in then if block not in wanted]
    assert chosen[len(wanted) :] == new[: size - len(wanted)]
