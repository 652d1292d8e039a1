"""Settings of searchers ranked by measured gains: the needle's setting wins, scores equal a plain computation."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Reading
from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.measured_gains import PlaceGains, check_places, read_gains, samples_file
from actors.evaluation.places import Place
from actors.evaluation.results import SampleFile
from actors.evaluation.retrieval import RANKED_BLOCKS, Retrieval
from actors.evaluation.retrieval_settings import (
    Bm25Setting,
    DenseSetting,
    FusionSetting,
    MinilmSetting,
    SearchSetting,
    Setting,
    default_fusion,
    fusion_grid,
    search_grid,
)
from actors.evaluation.retrieval_tuning import (
    BEST,
    CHANCE,
    METRICS,
    NEWEST,
    SPLIT_HALF,
    RetrievalTuner,
    TuningResults,
)
from actors.evaluation.statistics import clustered_mean
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.errors import ConfigError
from cluster.evaluation_config import RetrievalConfig
from cluster.tuning_config import RetrievalTuningConfig
from models.base_lm import BaseLM
from models.focus.allocators import reciprocal_rank_fusion
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeySpace, dense_scores, query_states
from models.focus.history import History
from storage.schema import KEYS
from tests.actors.evaluation.support import StoredText, stored, text_with_needle

NEEDLE_BLOCK = 9
STOP = 96
TAIL_BLOCKS = 2
SHOWN_FROM = STOP - TAIL_BLOCKS
BUDGET = 512

END = " and now of the quokka in zanzibar; it just went along again"
"""Of the history: who looks at the newest 16 characters alone does not see what is asked for."""

Tuned = Callable[..., TuningResults]


class WordEncoder:
    """Vectors of words' checksums: texts that share words are alike."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.full((len(texts), 384), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, zlib.crc32(word.encode()) % 384] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    """A needle in block 9, asked for at the end of block 95; the horizon behind."""
    before = text_with_needle(STOP, NEEDLE_BLOCK, end=END)
    with stored(tiny_lm_config, tmp_path_factory.mktemp("tuning"), [before + "x" * 300]) as tree:
        yield tree


def gains_at(number: int, stop: int = STOP, first: int = 1, uri: str = "doc0.txt") -> PlaceGains:
    """Little or nothing everywhere, 0.4 for the needle."""
    rng = np.random.default_rng(number)
    choosing, scoring = (rng.normal(0, 0.01, stop - TAIL_BLOCKS - first) for _ in range(2))
    choosing[NEEDLE_BLOCK - first], scoring[NEEDLE_BLOCK - first] = 0.5, 0.3
    return PlaceGains(Place(number, uri, first, stop), choosing, scoring)


@pytest.fixture(scope="module")
def tuned(lm: BaseLM, tree: StoredText) -> Tuned:
    """Tune on some places, by default of two histories that end at the same question."""

    def tune(config: RetrievalTuningConfig | None = None, *gains: PlaceGains) -> TuningResults:
        embeddings = BlockEmbeddings(WordEncoder(), tree.plan.tokenizer.decode_batch, tree.reader)
        tuner = RetrievalTuner(
            lm,
            tree.gistnet,
            tree.reader,
            tree.lexical,
            tree.plan.tokenizer,
            embeddings,
            config or RetrievalTuningConfig(),
        )
        for found in gains or (gains_at(0), gains_at(1, first=3, uri="other")):
            tuner.search(found)
        return tuner.results()

    return tune


@pytest.fixture(scope="module")
def results(tuned: Tuned) -> TuningResults:
    """The whole default grid."""
    return tuned()


# -- the needle ----------------------------------------------------------------------------------------------------


def test_only_who_asks_with_enough_tokens_finds_the_needle(results: TuningResults) -> None:
    for query_tokens, found in ((16, False), (64, True)):
        setting = Bm25Setting(query_tokens, 1.2, 0.75)
        assert np.allclose(results.values(setting, "hit_at_1"), found)
        if found:
            assert np.allclose(results.values(setting, "gain_at_1"), 0.4)
            assert np.allclose(results.values(setting, "best_rank"), 1)
        else:
            assert np.all(np.abs(results.values(setting, "gain_at_k")) < 0.1)
    assert results.best("bm25").columns["query tokens"] >= 32
    assert results.winners()["bm25_query_tokens"] >= 32


def test_references_bound_the_settings(results: TuningResults) -> None:
    best = results.values(BEST, "gain_at_k")
    for key in results.scores:
        assert np.all(results.values(key, "gain_at_k") <= best + 1e-12)
    assert np.allclose(results.values(BEST, "hit_at_1"), 1)
    assert np.allclose(results.values(NEWEST, "best_rank"), SHOWN_FROM - NEEDLE_BLOCK)
    # What was chosen on one half is scored on the other: both ways the needle.
    assert np.allclose(results.values(SPLIT_HALF, "gain_at_1"), 0.4)
    assert np.all(results.values(SPLIT_HALF, "gain_at_k") < best)


# -- scores and rankings, plainly ----------------------------------------------------------------------------------


def ranked_plainly(setting: SearchSetting, lm: BaseLM, tree: StoredText, place: Place) -> list[int]:
    """What `evaluate focus` ranks with these keys, or the cosines of states that were made for this query alone."""
    reading = Reading(lm, tree.reader, History.of(tree.reader, place.first_block, place.stop_block))
    if isinstance(setting, DenseSetting):
        blocks = np.arange(place.first_block, SHOWN_FROM)
        ids = reading.ids(place.stop_block - 512 // K, 512 // K)
        states = query_states(lm, tree.gistnet, ids, setting.query_tokens)
        space = KeySpace.of_tree(tree.reader, array=KEYS, whiten=setting.own_metric)
        keys = tree.reader.read(KEYS, 1, blocks)[:, 0]
        scores = dense_scores(keys, states, setting.match, space.centre, space.whitening)
        return blocks[np.argsort(-scores, kind="stable")].tolist()
    retrieval = Retrieval(
        reading,
        tree.lexical,
        tree.plan.tokenizer,
        tree.gistnet,
        KeySpace.of_tree(tree.reader, array=KEYS),
        SHOWN_FROM,
        replace(RetrievalConfig(), **setting.keys),
        BlockEmbeddings(WordEncoder(), tree.plan.tokenizer.decode_batch, tree.reader),
    )
    return [block for block, _ in (retrieval.bm25() if isinstance(setting, Bm25Setting) else retrieval.minilm())]


@pytest.mark.parametrize(
    "setting",
    [
        Bm25Setting(),
        Bm25Setting(256, 2.0, 0.0),
        Bm25Setting(16, 0.6, 0.4),
        DenseSetting(),
        DenseSetting(4, "max_sim", True),
        DenseSetting(128, "max_sim", False),
        DenseSetting(32, "pooled", False),
        MinilmSetting(),
        MinilmSetting(16),
    ],
)
def test_gains_are_those_of_the_blocks_that_are_ranked(
    setting: SearchSetting, results: TuningResults, lm: BaseLM, tree: StoredText
) -> None:
    for number, gains in enumerate(results.gains):
        ranked = ranked_plainly(setting, lm, tree, gains.place)
        by_block = dict(zip(gains.blocks.tolist(), gains.both, strict=True))
        won = [by_block[block] for block in ranked]
        scores = dict(zip(METRICS, results.scores[setting][number], strict=True))
        assert scores["gain_at_1"] == pytest.approx(won[0] if won else 0)
        assert scores["gain_at_k"] == pytest.approx(sum(won[:4]))
        if NEEDLE_BLOCK in ranked:
            assert scores["best_rank"] == ranked.index(NEEDLE_BLOCK) + 1
        else:
            assert scores["best_rank"] > min(len(ranked), RANKED_BLOCKS)


def test_means_and_differences_are_by_document(results: TuningResults) -> None:
    setting = Bm25Setting(16, 1.2, 0.75)
    uris = ["doc0.txt", "other"]
    assert results.documents == uris
    assert results.mean(setting, "gain_at_k") == clustered_mean(results.values(setting, "gain_at_k"), uris)
    difference = results.values(setting, "gain_at_k") - results.values(Bm25Setting(), "gain_at_k")
    assert results.over_default(setting, "gain_at_k") == clustered_mean(difference, uris)
    assert results.over_default(Bm25Setting(), "gain_at_k") is None
    report = results.as_report()
    assert {name: len(entries) for name, entries in report["searchers"].items()} == {
        "bm25": 45, "dense": 24, "minilm": 5, "fusion": len(results.settings("fusion")),
    }  # fmt: skip
    for entries in report["searchers"].values():
        assert sum(entry["default"] for entry in entries) == 1
        means = [entry["gain_at_k"] for entry in entries]
        assert means == sorted(means, reverse=True)


def test_fusion_is_of_the_best_rankings(results: TuningResults, lm: BaseLM, tree: StoredText) -> None:
    bm25, minilm = results.best("bm25"), results.best("minilm")
    assert isinstance(bm25, Bm25Setting)
    assert isinstance(minilm, MinilmSetting)
    fused = FusionSetting((bm25, minilm), 10.0)
    for number, gains in enumerate(results.gains):
        rankings = [[(b, 0) for b in ranked_plainly(member, lm, tree, gains.place)] for member in fused.members]
        picks = [block for block, _ in reciprocal_rank_fusion(rankings, 10.0)[:4]]
        expected = gains.both[np.array(picks) - gains.place.first_block].sum()
        assert results.values(fused, "gain_at_k")[number] == pytest.approx(expected)


def test_what_wins_can_be_set(results: TuningResults) -> None:
    config = replace(RetrievalConfig(), **results.winners())
    config.validate()
    dense = results.best("dense")
    assert isinstance(dense, DenseSetting)
    assert (dense.match, dense.own_metric) == ("pooled", True)
    fused = results.best("fusion")
    assert isinstance(fused, FusionSetting)
    assert list(config.fusion) == [member.searcher for member in fused.members]
    # Settings of the members are the winners' too, or the fusion would be another than was measured.
    assert all((member.keys or {}).items() <= results.winners().items() for member in fused.members)


def test_of_equals_the_default_comes_first(tuned: Tuned) -> None:
    same = replace(gains_at(0), choosing=np.ones(SHOWN_FROM - 1), scoring=np.ones(SHOWN_FROM - 1))
    config = RetrievalTuningConfig(bm25_query_tokens=[], minilm_query_tokens=[])
    results = tuned(config, same, same)
    assert results.searchers == ["dense"]
    assert results.best("dense") == DenseSetting()


gains_of = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


@given(choosing=gains_of, k=st.integers(1, 14), data=st.data())
@settings(deadline=None, max_examples=300)
def test_scores_of_any_order(choosing: list[int], k: int, data: st.DataObject) -> None:
    n, first = len(choosing), 40
    scoring = data.draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n))
    gains = PlaceGains(Place(0, "doc", first, first + n), np.array(choosing, float), np.array(scoring, float))
    blocks = data.draw(st.permutations(range(first, first + n)))
    blocks = blocks[: data.draw(st.integers(0, n))]
    both = [(a + b) / 2 for a, b in zip(choosing, scoring, strict=True)]
    best = {first + i for i, gain in enumerate(both) if gain == max(both)}
    score = gains.score(np.array(blocks, np.int64), k)
    assert score.gain_at_k == pytest.approx(sum(both[block - first] for block in blocks[:k]))
    assert score.gain_at_1 == pytest.approx(sum(both[block - first] for block in blocks[:1]))
    assert score.num_picked == min(len(blocks), k)
    assert score.hit_at_1 == bool(blocks and blocks[0] in best)
    ranks = [rank for rank, block in enumerate(blocks, start=1) if block in best]
    if ranks:
        assert score.best_rank == ranks[0]
    else:
        assert len(blocks) + 1 <= score.best_rank <= n
    # Chance is what all orders have in the mean.
    orders = [gains.score(np.random.default_rng(s).permutation(gains.blocks), k) for s in range(200)]
    chance = gains.chance(k)
    for metric in METRICS:
        values = np.array([getattr(o, metric) for o in orders])
        assert abs(values.mean() - getattr(chance, metric)) <= 5 * values.std() / np.sqrt(200) + 1e-9


def test_the_honest_best_gains_nothing_on_noise() -> None:
    rng = np.random.default_rng(3)
    honest, taken = [], []
    for number in range(200):
        gains = PlaceGains(Place(number, "doc", 0, 100), *rng.normal(0, 1, (2, 100)))
        honest.append(gains.split_half(4).gain_at_k)
        taken.append(gains.score(gains.best(), 4).gain_at_k)
        assert gains.chance(4).gain_at_k == pytest.approx(4 * gains.both.mean())
    assert np.mean(taken) > 5
    assert abs(np.mean(honest)) < 0.5


# -- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_holds_every_setting_once_and_the_defaults() -> None:
    grid = search_grid(RetrievalTuningConfig())
    assert len(grid) == len(set(grid)) == 45 + 24 + 5
    assert {Bm25Setting(), DenseSetting(), MinilmSetting()} <= set(grid)
    small = search_grid(RetrievalTuningConfig(bm25_query_tokens=[7, 7], bm25_k1=[1.0], bm25_b=[0.1]))
    assert [s for s in small if isinstance(s, Bm25Setting)] == [Bm25Setting(7, 1.0, 0.1), Bm25Setting()]
    alone = search_grid(RetrievalTuningConfig(bm25_query_tokens=[], minilm_query_tokens=[]))
    assert {setting.searcher for setting in alone} == {"dense"}


def test_the_grid_of_fusion() -> None:
    best: list[SearchSetting] = [Bm25Setting(32), DenseSetting(8), MinilmSetting(16)]
    grid = fusion_grid(best, [10, 60])
    assert len(grid) == 4 * 2 + 1
    assert grid[-1] == default_fusion()
    # Where the defaults are the best, they are in it once.
    known: list[Setting] = [*fusion_grid([Bm25Setting(), DenseSetting(), MinilmSetting()], [10, 60])]
    assert len(known) == 4 * 2
    assert default_fusion() in known
    assert fusion_grid(best[:1], [60]) == fusion_grid(best, []) == []


# -- the file ------------------------------------------------------------------------------------------------------


def write_samples(path: Path, samples: Sequence[tuple[Place, list[Measured]]]) -> Path:
    with SampleFile(path) as file:
        for place, measured in samples:
            file.append(place, measured)
    return path


def exhaustive(gains: PlaceGains, budget: int = BUDGET, form: str = "raw") -> Measured:
    rows = list(zip(gains.blocks.tolist(), gains.choosing.tolist(), gains.scoring.tolist(), strict=True))
    return Measured(f"exhaustive/{form}", budget, budget, 1.0, 1.0, single_gains=rows)


def test_gains_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [gains_at(number) for number in (2, 0, 1)]
    other = Measured("bm25/raw", BUDGET, BUDGET, 1.0, 1.0)
    samples = [(g.place, [other, exhaustive(g), exhaustive(g, form="overlay")]) for g in written]
    path = write_samples(tmp_path / "samples-0.jsonl", samples)
    with path.open("a") as file:
        file.write('{"place": {"num')  # the run goes on
    content = path.read_bytes()
    assert samples_file(tmp_path) == samples_file(path) == path
    for asked in (0, BUDGET):
        budget, found = read_gains(path, asked)
        assert budget == BUDGET
        assert [gains.place.number for gains in found] == [0, 1, 2]
        for gains in found:
            (source,) = [g for g in written if g.place == gains.place]
            np.testing.assert_array_equal(gains.choosing, source.choosing)
            np.testing.assert_array_equal(gains.scoring, source.scoring)
            np.testing.assert_array_equal(gains.blocks, np.arange(1, SHOWN_FROM))
    assert path.read_bytes() == content


def test_places_that_have_nothing_to_choose_from_are_left_out(tmp_path: Path) -> None:
    nothing = Measured("exhaustive/raw", BUDGET, BUDGET, 1.0, 1.0)
    samples = [(gains_at(0).place, [nothing]), (gains_at(1).place, [exhaustive(gains_at(1))])]
    _, found = read_gains(write_samples(tmp_path / "samples-0.jsonl", samples), 0)
    assert [gains.place.number for gains in found] == [1]


def test_files_without_gains_are_refused(tmp_path: Path) -> None:
    place = gains_at(0).place
    bare = write_samples(tmp_path / "bare.jsonl", [(place, [Measured("bm25/raw", BUDGET, BUDGET, 1.0, 1.0)])])
    with pytest.raises(ConfigError, match="no gains of single blocks; run `evaluate focus` with 'exhaustive'"):
        read_gains(bare, 0)
    two = write_samples(tmp_path / "two.jsonl", [(place, [exhaustive(gains_at(0)), exhaustive(gains_at(0), 256)])])
    with pytest.raises(ConfigError, match="budgets 256, 512; choose one with tuning.budget"):
        read_gains(two, 0)
    with pytest.raises(ConfigError, match="no gains within tuning.budget=128; there are: 256, 512"):
        read_gains(two, 128)
    assert read_gains(two, 256)[0] == 256


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", json.dumps({"place": {"number": 1}, "measured": []}) + "\n"])
def test_what_holds_no_samples_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "samples-0.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="holds no samples of `evaluate focus`"):
        read_gains(samples_file(tmp_path), 0)


def test_a_path_without_one_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no samples at"):
        samples_file(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must hold one file of samples, not none"):
        samples_file(tmp_path)
    for name in "ab":
        (tmp_path / f"samples-{name}.jsonl").touch()
    with pytest.raises(ConfigError, match="not samples-a.jsonl, samples-b.jsonl"):
        samples_file(tmp_path)


def test_gains_of_other_blocks_are_refused(tmp_path: Path) -> None:
    gains = gains_at(0)
    moved = replace(gains, place=replace(gains.place, first_block=2))
    path = write_samples(tmp_path / "samples-0.jsonl", [(gains.place, [exhaustive(moved)])])
    with pytest.raises(ConfigError, match="place 0 holds gains of other blocks"):
        read_gains(path, 0)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (Place(0, "other.txt", 1, STOP), "here that is doc0.txt"),
        (Place(0, "doc0.txt", 1, 5000), "here that is one of"),
        (Place(0, "doc0.txt", 7, 7), "here that is one of"),
    ],
)
def test_samples_of_another_context_are_refused(place: Place, found: str, tree: StoredText) -> None:
    check_places([gains_at(0).place], tree.reader, Path("samples"))
    with pytest.raises(ConfigError, match=f"measured on another context than 'c': place 0 .*{found}"):
        check_places([place], tree.reader, Path("samples"))


def test_chance_is_no_setting(results: TuningResults) -> None:
    assert np.isnan(results.values(SPLIT_HALF, "hit_at_1")).all()
    assert results.values(CHANCE, "hit_at_1") == pytest.approx([1 / len(g.blocks) for g in results.gains])
